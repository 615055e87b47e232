"""The run's configuration: what is wrong is refused with its key, its value and what would be right."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig, nested
from common.errors import ConfigError, UserError

REFUSED = [
    ("num-rounds", "3", "a valid integer"),
    ("num-rounds", 3.5, "a valid integer"),
    ("num-rounds", True, "a valid integer"),
    ("num-rounds", 0, "greater than or equal to 1"),
    ("num-rounds", 10_001, "less than or equal to 10000"),
    ("min-sites", 0, "greater than or equal to 1"),
    ("round-timeout", 0.0, "greater than 0"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than"),
    ("method", "fedavg", "'descent', 'oneshot' or 'fedmd'"),
    ("scenario", "lungs", "'heart'"),
    ("codec", "int3", "'int8', 'int4', 'int2', 'int1', 'fp16' or 'fp32'"),
    ("students", "many", "'same' or 'mixed'"),
    ("aggregation.rule", "loudest", "'trimmed-mean'"),
    ("aggregation.trim", 0.5, "less than 0.5"),
    ("aggregation.temperature", 0.0, "greater than 0"),
    ("teacher.temperature", 0.0, "greater than 0"),
    ("student.temperature", -1.0, "greater than 0"),
    ("student.alpha", 1.1, "less than or equal to 1"),
    ("student.weight-decay", float("inf"), "finite"),
    ("privacy.epsilon", 0.0, "greater than 0"),
    ("privacy.epsilon", -1.0, "greater than 0"),
    ("privacy.epsilon", float("nan"), "finite"),
    ("privacy.epsilon", float("inf"), "finite"),
    ("privacy.epsilon", "1", "a valid number"),
    ("privacy.site-epsilons", "1 3", "numbers from 0.000001 to 999 with commas between"),
    ("privacy.site-epsilons", "1;2", "numbers from 0.000001 to 999 with commas between"),
    ("privacy.site-epsilons", "1,0", "numbers from 0.000001 to 999 with commas between"),
    ("privacy.delta", 0.0, "greater than 0"),
    ("privacy.delta", 1.0, "less than or equal to 0.1"),
    ("privacy.sample-rate", 1.5, "less than or equal to 1"),
    ("privacy.unit", "hospital", "'record' or 'patient'"),
    ("data.proxy-labels", -2, "greater than or equal to -1"),
    ("data.alpha", 0.0, "greater than 0"),
    ("run-id", "../elsewhere", "a name of letters"),
    ("run-id", "a b", "a name of letters"),
    ("run-id", "x" * 101, "a shorter name"),
    ("num-round", 3, "did you mean num-rounds"),
    ("privacy.eps", 1.0, "did you mean privacy.epsilon"),
    ("num_rounds", 3, "did you mean num-rounds"),
    ("privacy", 3, "a section"),
    ("nonsense", 1, "a key that exists"),
]


@pytest.mark.parametrize(
    ("key", "value", "expected"), REFUSED, ids=[f"{k}={v!r}"[:40] for k, v, _ in REFUSED]
)
def test_what_is_wrong_is_refused_with_key_value_and_what_would_be_right(key, value, expected):
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_run_config({key: value}, "study.toml")
    assert (refused.value.where, refused.value.key) == ("study.toml", key)
    assert repr(value) in str(refused.value)
    assert expected in refused.value.expected


def test_a_whole_number_will_do_for_a_fraction_but_no_other_type_is_bent():
    config = RunConfig.from_run_config({"privacy.epsilon": 3})
    assert config.privacy.epsilon == 3.0 and isinstance(config.privacy.epsilon, float)


def test_flat_and_from_run_config_are_inverse():
    config = RunConfig.from_run_config({"method": "fedmd", "privacy.epsilon": 0.5, "data.num-sites": 7})
    assert RunConfig.from_run_config(config.flat()) == config


@pytest.mark.parametrize(
    "flat",
    [{"privacy": 3, "privacy.epsilon": 1.0}, {"privacy.epsilon": 1.0, "privacy": 3}, {"a.b": 1, "a.b.c": 2}],
)
def test_a_key_cannot_be_a_value_and_a_section(flat):
    with pytest.raises(UserError, match="section"):
        RunConfig.from_run_config(flat)


keys = st.text(st.characters(categories=["Ll"]), min_size=1, max_size=3)


@given(st.dictionaries(st.lists(keys, min_size=1, max_size=3).map(".".join), st.integers(), max_size=5))
def test_unfolding_loses_nothing_or_refuses(flat):
    try:
        tree = nested(flat)
    except UserError:
        return
    for key, value in flat.items():
        branch = tree
        for part in key.split("."):
            branch = branch[part]
        assert branch == value


def test_a_method_with_one_round_takes_all_steps_in_it():
    many = RunConfig.from_run_config({"num-rounds": 5, "privacy.steps-per-round": 4})
    assert many.schedule == (5, 4)
    assert many.model_copy(update={"method": "oneshot"}).schedule == (1, 20)


def test_every_scenario_is_a_run_config_that_flower_takes():
    folder = Path(__file__).resolve().parents[2] / "simulations" / "scenarios"
    known = set(RunConfig().flat())
    for path in folder.glob("*.toml"):
        tree = tomllib.loads(path.read_text())
        flat = {
            f"{section}.{key}" if section else key: value
            for section, branch in [("", tree), *((k, v) for k, v in tree.items() if isinstance(v, dict))]
            for key, value in branch.items()
            if not isinstance(value, dict)
        }
        assert set(flat) <= known
        assert RunConfig.from_run_config(flat, path.name).scenario == path.stem
