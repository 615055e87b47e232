"""Weights that travel: held against one party that does the same at one place, and against each other."""

import pytest

from simulations.baselines.references import pooled_dp
from simulations.baselines.weights import FLOAT32, dp_fedavg, feddf
from simulations.settings import run_settings

LOUDLESS = "privacy.epsilon=1000.0"
"""So little noise that sums in another order show more."""


def configured(pairs: str = ""):
    return run_settings("heart", [pairs])


def test_fedsgd_without_noise_takes_the_steps_of_one_party_with_all_records(bench):
    """Σ (m_k/M)·(1/m_k)·Σ g is (1/M)·Σ g, whatever the sizes of the sites; momentum included."""
    config = configured(f"{LOUDLESS} aggregation.momentum=0.5")
    ours, theirs = dp_fedavg(config, bench).scores, pooled_dp(config, bench)
    assert ours["log_loss"] == pytest.approx(theirs["log_loss"], abs=2e-3)
    assert ours["auroc"] == pytest.approx(theirs["auroc"], abs=2e-3)


def test_several_local_steps_are_not_the_same_as_one(bench):
    one = dp_fedavg(configured(f"{LOUDLESS} num-rounds=10 privacy.steps-per-round=1"), bench)
    three = dp_fedavg(configured(f"{LOUDLESS} num-rounds=10 privacy.steps-per-round=3"), bench)
    assert one.scores != three.scores


def test_feddf_of_linear_students_is_fedavg_but_for_the_fit(bench):
    config = configured(f"{LOUDLESS} num-rounds=5")
    average, fused = dp_fedavg(config, bench), feddf(config, bench)
    assert fused.scores["auroc"] == pytest.approx(average.scores["auroc"], abs=0.01)
    assert fused.scores != average.scores


def test_feddf_distils_students_that_are_not_linear(bench):
    from simulations.baselines.bench import Bench

    config = configured(f'{LOUDLESS} num-rounds=2 student.model="mlp" student.epochs=5')
    deep = Bench.open(config)
    assert abs(feddf(config, deep).scores["auroc"] - dp_fedavg(config, deep).scores["auroc"]) > 1e-6


def test_what_travels_and_what_it_costs(bench):
    found = dp_fedavg(configured("num-rounds=7"), bench)
    weights = 2 * (bench.parties[0].units.phi_ND.shape[1] + 1)
    assert found.bytes_up == found.bytes_down == FLOAT32 * weights
    assert found.rounds == 7 and 0.99 < found.guarantee.epsilon <= 1.0
    assert (found.guarantee.delta, found.guarantee.adjacency) == (1e-5, "add-remove")


def test_the_same_seed_gives_the_same_and_less_epsilon_less(bench):
    config = configured()
    assert dp_fedavg(config, bench) == dp_fedavg(config, bench)
    poor = dp_fedavg(configured("privacy.epsilon=0.02"), bench)
    assert poor.scores["auroc"] < dp_fedavg(config, bench).scores["auroc"] - 0.02
