"""What a federation is held against: the same test cases, the same ε, and for pooled parties all records."""

import numpy as np
import pytest
import torch

from client.private_step import Units
from common.config import RunConfig
from common.datasets import load_private, sites
from common.summary import Results, statistic
from simulations.baselines.bench import Bench, Party, pool
from simulations.baselines.references import mean_over_sites, with_comparisons
from simulations.settings import run_settings

FEDERATION = Results(federation={"auroc": statistic([0.9]), "accuracy": statistic([0.8])})


def configured(pairs: str = "") -> RunConfig:
    return run_settings("heart", [pairs])


@pytest.fixture(scope="module")
def compared() -> Results:
    return with_comparisons(configured(), FEDERATION)


def auroc(results: Results, name: str) -> float:
    return getattr(results, name)["auroc"].mean


def test_all_rows_are_there_and_the_federations_is_as_it_was(compared):
    assert compared.federation == FEDERATION.federation
    assert list(compared.sites_alone_each) == ["cleveland", "hungary", "switzerland", "long-beach"]
    for name in ("sites_alone", "pooled_dp", "pooled_no_privacy"):
        assert set(getattr(compared, name)) == {"auroc", "accuracy"}


def test_all_records_without_privacy_beat_all_with_it_and_those_beat_sites_alone(compared):
    assert auroc(compared, "pooled_no_privacy") > auroc(compared, "pooled_dp") - 0.01
    assert auroc(compared, "pooled_dp") > auroc(compared, "sites_alone") + 0.02


def test_a_site_alone_knows_neither_the_teacher_nor_the_others(compared):
    without_teacher = with_comparisons(configured('teacher.model="none"'), FEDERATION)
    assert without_teacher.sites_alone_each == compared.sites_alone_each
    assert without_teacher.pooled_dp != compared.pooled_dp


@pytest.mark.parametrize(
    "pairs", ['codec="fp32"', "min-sites=4", 'aggregation.rule="trimmed-mean"', 'method="fedmd"']
)
def test_what_travels_between_sites_is_nothing_to_those_who_stand_alone(compared, pairs):
    assert with_comparisons(configured(pairs), FEDERATION) == compared


def test_the_same_seed_gives_the_same_rows_and_a_smaller_budget_worse_ones(compared):
    assert with_comparisons(configured(), FEDERATION) == compared
    poor = with_comparisons(configured("privacy.epsilon=0.02"), FEDERATION)
    assert auroc(poor, "sites_alone") < auroc(compared, "sites_alone") - 0.05
    assert poor.pooled_no_privacy == compared.pooled_no_privacy


def test_the_pooled_party_holds_every_record_once():
    config = configured()
    bench = Bench.open(config)
    parties, together = bench.parties, bench.pooled
    held = [len(load_private(config, site.name)) for site in sites(config)]
    assert [len(party.units.y_N) for party in parties] == held
    assert len(together.units.y_N) == len(together.units.count_U) == sum(held)
    assert together.declared_size == sum(site.declared_size for site in sites(config))
    # Every unit of the pool leads to the record that it led to before.
    separate = torch.cat([party.units.phi_ND[torch.tensor(party.units.order_N)] for party in parties])
    joined = together.units.phi_ND[torch.tensor(together.units.order_N[together.units.start_U])]
    assert torch.equal(separate, joined)


def test_each_site_alone_has_its_own_budget_and_the_pool_the_largest(compared):
    poor = with_comparisons(configured('privacy.site-epsilons="0.02,1"'), FEDERATION)
    for name, metrics in compared.sites_alone_each.items():
        assert (poor.sites_alone_each[name] == metrics) == (name in ("hungary", "long-beach"))
    assert poor.pooled_dp == compared.pooled_dp


def test_patients_stay_whole_in_the_pool():
    def party(name: str, patients: list[int]) -> Party:
        count = len(patients)
        phi = torch.arange(count, dtype=torch.float32)[:, None] + (100 if name == "b" else 0)
        return Party(name, Units.group(phi, torch.zeros(count, dtype=torch.int64), np.array(patients)), count)

    a, b = party("a", [1, 0, 1]), party("b", [0, 0, 1, 1, 1])
    units = pool((a, b)).units
    seen = [
        set(units.phi_ND[units.order_N[start : start + count], 0].tolist())
        for start, count in zip(units.start_U, units.count_U, strict=True)
    ]
    assert seen == [{1.0}, {0.0, 2.0}, {100.0, 101.0}, {102.0, 103.0, 104.0}]


def test_the_mean_over_sites_is_taken_seed_by_seed_over_those_that_have_the_metric():
    each = {
        "a": {"auroc": statistic([0.6, 0.8]), "accuracy": statistic([0.5, 0.5])},
        "b": {"accuracy": statistic([0.7, 0.9])},
    }
    mean = mean_over_sites(each)
    assert mean["auroc"].values == (0.6, 0.8)
    assert mean["accuracy"].values == pytest.approx((0.6, 0.7))
