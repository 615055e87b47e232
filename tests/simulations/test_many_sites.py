"""What many sites cost: the ε that brings their noise, and every line of the table."""

import math

import pytest

from simulations.baselines.bench import Bench, plan_alone
from simulations.many_sites import NEXT_TO_NO_NOISE, as_table, contenders, epsilon_of_noise, measure
from simulations.settings import run_settings

DEALT = "data.partition='dirichlet' data.num-sites=3 num-rounds=1"


@pytest.mark.parametrize("many", [2, 20, 200])
def test_the_smaller_epsilon_brings_as_much_noise_as_all_sites(many):
    config = run_settings("heart", [])
    epsilon = epsilon_of_noise(config, math.sqrt(many))
    assert epsilon < config.privacy.epsilon
    louder = run_settings("heart", [f"privacy.epsilon={epsilon}"])
    times = plan_alone(louder).noise_multiplier() / plan_alone(config).noise_multiplier()
    assert times == pytest.approx(math.sqrt(many), rel=0.01)


def test_every_line_has_a_score_under_every_epsilon():
    config = run_settings("heart", [DEALT])
    lines = measure(config, [1.0, 8.0], [300])
    names = ["3 sites", "1 site, √3 times the noise", "1 site", "pooled"]
    expected = [(name, epsilon) for epsilon in (1.0, 8.0) for name in names]
    assert [(line.name, line.epsilon) for line in lines] == [*expected, ("3 sites", NEXT_TO_NO_NOISE)]
    assert all(50 < score <= 100 for line in lines for score in line.scores)
    assert as_table(lines).row_count == len(names)
    # The same seed gives the same scores.
    again = list(contenders(config.model_copy(update={"seed": 300}), Bench.open(config), [1.0]))
    assert again[0][2]["auroc"] == lines[0].scores[0] / 100
