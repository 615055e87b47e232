"""A study's run config, as it holds on the coordinator's machine."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.simulated import close_sites
from common.datasets import load_public
from common.errors import UserError
from common.plan import Plan
from common.runs import CHECKPOINT, RunFolder
from server.checkpoint import Progress, fingerprint, keep
from server.federation import studies
from server.federation.flower import nodes
from server.federation.settings import Federation
from server.federation.studies import (
    broken_off,
    for_agreed_app,
    is_whole,
    public_plan,
    require_new,
    study_config,
)
from server.methods import State
from simulations.inprocess import run_inprocess

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
        require_new(founded[0], config)


def test_a_superlink_that_does_not_run_is_one_line_with_the_command_that_starts_it(founded):
    with pytest.raises(UserError, match="grandrounds federation start"):
        nodes(founded[0])


@pytest.fixture
def runs(founded, tmp_path) -> Iterator[Path]:
    """A folder in which the study `trial` has broken off."""
    config = study_config(founded[0], [HEART, f'run-id="trial" out="{tmp_path}"'])
    with pytest.raises(KeyboardInterrupt), RunFolder.open(tmp_path / "trial", config.resumable) as folder:
        known = fingerprint(config, load_public(config))
        keep(folder, config, Progress(known, State.start(np.zeros((3, 2), dtype=np.float32)), b"weights"))
        raise KeyboardInterrupt
    yield tmp_path


def test_a_study_that_broke_off_goes_on_with_its_own_settings_wherever_it_lies(founded, runs):
    (runs / ".trial.partial").rename(runs / "copied")
    elsewhere = runs / "elsewhere"
    elsewhere.mkdir()
    (runs / "copied").rename(elsewhere / ".trial.partial")
    config = broken_off(founded[0], "trial", elsewhere, ["min-sites=2"])
    assert (config.run_id, config.num_rounds, config.min_sites) == ("trial", 2, 2)
    assert Path(config.out) == elsewhere and config.resumable
    with pytest.raises(UserError, match="num-rounds = 2, not 3"):
        broken_off(founded[0], "trial", elsewhere, ["num-rounds=3"])


def test_a_server_that_is_ending_is_waited_for(founded, runs):
    taken = RunFolder.open(runs / "trial", resumes=True)
    taken.__enter__()
    ending = threading.Timer(0.5, taken.__exit__, (OSError, OSError("cut off"), None))
    ending.start()
    assert broken_off(founded[0], "trial", runs, []).run_id == "trial"
    ending.join()


def test_what_cannot_go_on_is_told_in_one_line(founded, runs, monkeypatch):
    monkeypatch.setattr(studies, "ENDING_PATIENCE", 0.0)
    with pytest.raises(UserError, match=r"nothing to go on with, .*; studies that broke off there: trial$"):
        broken_off(founded[0], "other", runs, [])
    with pytest.raises(UserError, match=r"nothing to go on with, .*; no study broke off there$"):
        broken_off(founded[0], "trial", None, [])
    with RunFolder.open(runs / "trial", resumes=True), pytest.raises(UserError, match="is under way"):
        broken_off(founded[0], "trial", runs, [])
    assert (runs / "trial").exists()  # that run has ended well
    with pytest.raises(UserError, match="is finished: its results are in"):
        broken_off(founded[0], "trial", runs, [])


def test_a_damaged_checkpoint_is_named(founded, runs):
    checkpoint = runs / ".trial.partial" / CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"checkpoint.safetensors is damaged"):
        broken_off(founded[0], "trial", runs, [])


def test_a_study_that_broke_off_is_not_begun_again_by_mistake(founded, runs):
    config = study_config(founded[0], [HEART, f'run-id="trial" out="{runs}"'])
    with pytest.raises(UserError, match=r"grandrounds federation resume .* trial goes on with it"):
        require_new(founded[0], config)


def test_an_agreed_app_of_another_version_gets_the_keys_it_knows_and_refuses_the_rest(founded, tmp_path):
    shutil.copytree(founded[0].app, tmp_path / "app")
    settings = tmp_path / "app" / "pyproject.toml"
    settings.write_text(settings.read_text().replace("patience = 0\n", "", 1))
    older = Federation(tmp_path, founded[0].settings)
    named = [HEART, 'run-id="trial"']
    known = for_agreed_app(founded[0], study_config(founded[0], named))
    assert for_agreed_app(older, study_config(older, named)).keys() == known.keys() - {"patience"}
    with pytest.raises(UserError, match="patience = 3 is refused"):
        for_agreed_app(older, study_config(older, [*named, "patience=3"]))


def test_results_are_whole_once_every_round_is_in_them(tmp_path):
    results = tmp_path / "trial"
    assert not is_whole(results)
    try:
        run_inprocess({"out": str(tmp_path), "run-id": "trial", "num-rounds": 1}, 4)
    finally:
        close_sites()
    assert is_whole(results)
    summary = results / "summary.json"
    summary.write_text(summary.read_text().replace('"status": "complete"', '"status": "incomplete"'))
    assert not is_whole(results)
