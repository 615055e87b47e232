"""A run's folder: whole under its name or not there at all, and never two runs in one place."""

import os
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import UserError
from common.runs import LOCK, RunFolder, final_folder, working_folder, write_whole


def write(folder: RunFolder) -> None:
    folder.keep_model("student.safetensors", b"weights")


def test_a_whole_run_gets_its_name_and_nothing_else_is_left(tmp_path):
    with RunFolder.open(tmp_path / "out" / "run") as folder:
        write(folder)
        assert folder.name == "run"
        assert not folder.final.exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]
    assert [path.name for path in folder.final.iterdir()] == ["student.safetensors"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError, UserError])
def test_a_run_that_is_broken_off_leaves_nothing(tmp_path, interruption):
    with pytest.raises(interruption), RunFolder.open(tmp_path / "run") as folder:
        write(folder)
        raise interruption
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_may_be_used_and_one_with_anything_in_it_not(tmp_path):
    (tmp_path / "empty").mkdir()
    with RunFolder.open(tmp_path / "empty") as folder:
        write(folder)
    assert (tmp_path / "empty" / "student.safetensors").exists()
    with pytest.raises(UserError, match="is there already"):
        RunFolder.open(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is there already"):
        RunFolder.open(tmp_path / "file")


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the folder that you are in"):
        RunFolder.open(Path.cwd())
    assert not list(tmp_path.iterdir())


def test_two_runs_never_write_to_the_same_place(tmp_path):
    with RunFolder.open(tmp_path / "run") as first:
        write(first)
        with pytest.raises(UserError, match="being written by another run"):
            RunFolder.open(tmp_path / "run")
        assert (first.path / "student.safetensors").exists()
    assert (tmp_path / "run" / "student.safetensors").exists()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, UserError])
def test_a_run_that_resumes_leaves_its_work_to_the_next_of_its_name(tmp_path, interruption):
    with pytest.raises(interruption), RunFolder.open(tmp_path / "run", resumes=True) as folder:
        write(folder)
        raise interruption
    assert not folder.final.exists()
    with RunFolder.open(tmp_path / "run", resumes=True) as folder:
        assert (folder.path / "student.safetensors").read_bytes() == b"weights"
        folder.clear()
        assert [path.name for path in folder.path.iterdir()] == [LOCK]
        write(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    left = working_folder(tmp_path / "run")
    (left / "sites" / "a").mkdir(parents=True)
    (left / "rounds.jsonl").write_text("old")
    (left / LOCK).touch()
    with RunFolder.open(tmp_path / "run") as folder:
        write(folder)
    assert [path.name for path in folder.final.iterdir()] == ["student.safetensors"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run can't be written"):
        RunFolder.open(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="can't be written"):
        RunFolder.open(tmp_path / ("x" * 300))


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match=r"run can't be written"), RunFolder.open(tmp_path / "run") as folder:
        write(folder)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "somebody-elses").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["somebody-elses"]


def test_a_full_disk_is_called_that_whatever_failed_first(tmp_path, monkeypatch):
    monkeypatch.setattr("common.runs.LEAST_FREE", 1 << 62)
    with pytest.raises(UserError, match="the disk is full"), RunFolder.open(tmp_path / "run"):
        raise RuntimeError("a consequence of it")
    with pytest.raises(KeyboardInterrupt), RunFolder.open(tmp_path / "run"):
        raise KeyboardInterrupt


def test_where_a_run_goes_follows_from_its_configuration_and_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = RunConfig(out="somewhere", run_id="mine")
    assert final_folder(named, 7) == Path(os.getcwd()) / "somewhere" / "mine"
    assert final_folder(RunConfig(), 7) == Path(os.getcwd()) / "runs" / "heart-7"


def test_a_link_in_the_place_of_the_unfinished_file_leads_nowhere(tmp_path):
    """As somebody may lay it into a folder of theirs in which root writes."""
    (tmp_path / "precious").write_text("as it was")
    (tmp_path / ".key.partial").symlink_to(tmp_path / "precious")
    write_whole(tmp_path / "key", b"secret", 0o600)
    assert (tmp_path / "precious").read_text() == "as it was"
    assert (tmp_path / "key").read_bytes() == b"secret" and not (tmp_path / "key").is_symlink()
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
