"""Opinions beside weights: every contender runs on the same cases, and its bytes are all that travels."""

import pytest

from simulations.benchmarks.opinions_or_weights import CONTENDERS, Contender, as_table, measure
from simulations.settings import run_settings

FEW = {"num-rounds": 2, "privacy.steps-per-round": 1}


@pytest.fixture(scope="module")
def lines():
    contenders = (
        Contender("teacher", "teacher-alone", "head", {}),
        Contender("opinions", "federation", "head", {**FEW, "codec": "int4"}),
        Contender("weights", "dp-fedavg", "all", FEW),
        Contender("head", "dp-fedavg", "head", FEW),
    )
    config = run_settings("heart", ['student.model="mlp" student.features="none"'])
    return {one.label: one for one in measure(config, contenders, [4])}


def test_weights_cost_four_bytes_each_and_a_head_a_small_part_of_them(lines):
    assert lines["weights"].bytes_up == lines["weights"].bytes_down > 2 * 4 * 8_000
    assert 0 < lines["head"].bytes_up < lines["weights"].bytes_up / 50
    assert 0 < lines["opinions"].bytes_up < lines["opinions"].bytes_down < lines["weights"].bytes_up
    assert lines["teacher"].bytes_up == 0


def test_each_has_a_score_a_seed_and_a_row(lines):
    assert all(len(one.scores) == 1 and 0.5 < one.scores[0] <= 1 for one in lines.values())
    assert as_table(list(lines.values())).row_count == 4


def test_contenders_are_told_apart_and_all_can_be_configured():
    assert len({one.label for one in CONTENDERS}) == len(CONTENDERS)
    for one in CONTENDERS:
        pairs = " ".join(f"{key}={value!r}".replace("'", '"') for key, value in one.settings.items())
        assert run_settings("fashion", [pairs]).num_rounds == one.settings.get("num-rounds", 30)
