"""A study's run config, as it holds on the coordinator's machine."""

from pathlib import Path

import pytest

from common.errors import UserError
from common.plan import Plan
from server.federation.flower import nodes
from server.federation.settings import Federation
from server.federation.studies import public_plan, study_config, submit

from .conftest import settings

HEART = 'scenario="heart" num-rounds=2'


def test_a_study_needs_a_name(founded):
    with pytest.raises(UserError, match="run-id is missing"):
        study_config(founded[0], [HEART])


def test_a_study_has_no_other_sites_than_the_federation(founded):
    few = Federation(founded[0].path, settings(sites=("cleveland", "hungary")))
    with pytest.raises(UserError, match="switzerland"):
        study_config(few, [HEART, 'run-id="trial"'])


def test_paths_start_where_the_command_is_typed_and_results_lie_in_the_folder(founded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = study_config(founded[0], [HEART, 'run-id="trial" teacher.path="t.safetensors"'])
    assert Path(ours.out) == founded[0].runs and Path(ours.teacher.path) == tmp_path / "t.safetensors"
    assert Path(study_config(founded[0], [HEART, 'run-id="trial" out="there"']).out) == tmp_path / "there"


def test_the_plan_is_the_one_that_the_run_will_ask_for(founded):
    plan = Plan.model_validate_json(public_plan(study_config(founded[0], [HEART, 'run-id="trial"'])))
    assert (plan.study, plan.rounds, plan.epsilon) == ("trial", 2, 1.0)


def test_results_of_the_same_name_are_never_overwritten(founded, tmp_path):
    config = study_config(founded[0], [HEART, f'run-id="trial" out="{tmp_path}"'])
    (tmp_path / "trial").mkdir()
    with pytest.raises(UserError, match="choose another run-id"):
        submit(founded[0], config)


def test_a_superlink_that_does_not_run_is_one_line_with_the_command_that_starts_it(founded):
    with pytest.raises(UserError, match="grandrounds federation start"):
        nodes(founded[0])
