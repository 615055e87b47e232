"""From what a person types to a configuration: later sources win; what is wrong is refused with its place."""

import pytest
from flwr.common.config import parse_config_args

from common.config import RunConfig
from common.errors import ConfigError, UserError
from simulations.settings import SCENARIOS, run_settings, scenario_names


def test_every_scenario_is_what_its_file_says():
    assert scenario_names() == ["fashion", "heart", "own", "reviews", "thyroid"]
    for name in scenario_names():
        assert run_settings(name, []).scenario == name
        assert run_settings(str(SCENARIOS / f"{name}.toml"), []) == run_settings(name, [])


def test_later_sources_win(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text("num-rounds = 7\n[privacy]\nepsilon = 2.0\nclipping-norm = 0.9\n")
    config = run_settings("heart", [str(study), "privacy.epsilon=3.0 num-rounds=8", "num-rounds=9"])
    assert (config.num_rounds, config.privacy.epsilon, config.privacy.clipping_norm) == (9, 3.0, 0.9)
    assert config.teacher == run_settings("heart", []).teacher


def test_a_scenario_may_be_a_file_of_ones_own(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text('scenario = "thyroid"\nnum-rounds = 3\n')
    config = run_settings(str(study), [])
    assert (config.scenario, config.num_rounds) == ("thyroid", 3)


def test_an_override_may_not_change_the_scenario_that_was_named():
    with pytest.raises(UserError, match=r"'thyroid' is refused: 'heart' was asked for.*simulate thyroid"):
        run_settings("heart", ['scenario="thyroid"'])


def test_a_files_input_paths_are_beside_it_and_a_pairs_in_the_working_directory(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text(
        'scenario = "own"\nout = "runs"\n[data]\ndescription = "data.toml"\nfolder = "/tables"\n'
    )
    config = run_settings(str(study), [])
    assert (config.data.description, config.data.folder) == (str(tmp_path / "data.toml"), "/tables")
    assert config.out == "runs"
    assert run_settings("own", ['data.description="data.toml"']).data.description == "data.toml"


@pytest.mark.parametrize(
    "pairs",
    [
        "num-rounds=3",
        'method="fedmd" num-rounds=3 privacy.epsilon=0.5',
        "method='fedmd'   codec='fp16'",
        'out="a folder with spaces" run-id="x"',
        'out="a=b c=d" seed=4',
        "",
        "  privacy.delta=1e-6  ",
    ],
)
def test_pairs_are_read_as_flower_reads_them(pairs):
    expected = RunConfig.from_run_config(run_settings("heart", []).flat() | parse_config_args([pairs]))
    assert run_settings("heart", [pairs]) == expected


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("method=fedmd", "expected key=value pairs, strings in quotes"),
        ("num-rounds", "expected key=value pairs"),
        ("num-rounds = 3", "expected key=value pairs"),
        ('out="unfinished', "expected key=value pairs"),
        ("num-rounds=3 num-rounds=4", "expected key=value pairs"),
        ("there-is-no-such.toml", "there-is-no-such.toml: can't be read"),
    ],
)
def test_what_cannot_be_read_is_shown(override, complaint):
    with pytest.raises(UserError, match=complaint):
        run_settings("heart", [override])


def test_a_refusal_names_the_source_and_a_later_source_does_not_hide_it(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text('num-rounds = "three"\n')
    with pytest.raises(ConfigError) as refused:
        run_settings("heart", [str(study), "num-rounds=3"])
    assert (refused.value.where, refused.value.key) == (str(study), "num-rounds")
    with pytest.raises(ConfigError) as refused:
        run_settings("heart", ["num-round=3"])
    assert (refused.value.where, refused.value.key) == ("--run-config", "num-round")
    study.write_text("seeds = [0, 1]\n")
    with pytest.raises(ConfigError, match="run config holds no lists"):
        run_settings(str(study), [])
    study.write_text("num-rounds 3\n")
    with pytest.raises(UserError, match="expected valid TOML"):
        run_settings(str(study), [])


def test_an_unknown_scenario_is_answered_with_those_there_are():
    with pytest.raises(UserError, match=r"no scenario 'hart': one of fashion, heart, own, reviews, thyroid"):
        run_settings("hart", [])
