"""`grandrounds simulate` as people and programs meet it: exit codes, one line of complaint, clean output."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.codec import CODECS
from common.errors import UserError
from common.runs import RunFolder
from simulations.commands import parse_seeds

ROOT = Path(__file__).resolve().parents[2]


def heed_ctrl_c() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would whatever they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, *arguments: str, preexec_fn=heed_ctrl_c) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "grandrounds", "simulate", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


# ---- What is refused ----


def test_in_a_folder_that_is_gone_nothing_starts(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    run = subprocess.run(
        ["sh", "-c", 'rmdir "$1" && exec "$2" -m grandrounds simulate', "-", str(gone), sys.executable],
        cwd=gone,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "the folder that you are in is gone" in run.stderr
    assert "Traceback" not in run.stderr


REFUSED = [
    ('num-rounds="3"', "num-rounds", "'3'", "a valid integer"),
    ("num-round=3", "num-round", "3", "did you mean num-rounds"),
    ("privacy.epsilon=0.0", "privacy.epsilon", "0.0", "greater than 0"),
    ("privacy.epsilon=-1.0", "privacy.epsilon", "-1.0", "greater than 0"),
    ("student.temperature=0.0", "student.temperature", "0.0", "greater than 0"),
    ("teacher.temperature=0.0", "teacher.temperature", "0.0", "greater than 0"),
    ("proxy-cases=185", "proxy-cases", "185", "at most the 184"),
    ("data.proxy-size=900", "data.proxy-size", "900", "at most 659"),
    ("data.proxy-labels=185", "data.proxy-labels", "185", "at most data.proxy-size, 184"),
    ("data.proxy-labels=0", "teacher.model", "'linear'", "no proxy case is labelled"),
    ('privacy.unit="patient"', "privacy.unit", "'patient'", "record"),
    ("min-sites=5", "min-sites", "5", "at most the 4 sites"),
]


@pytest.mark.parametrize(("override", "key", "value", "right"), REFUSED, ids=[one[0] for one in REFUSED])
def test_a_wrong_setting_is_refused_and_nothing_is_written(command, tmp_path, override, key, value, right):
    code, out, err = command("simulate", "--out", str(tmp_path / "out" / "run"), "--run-config", override)
    assert code == 2 and out == ""
    assert f"{key} = {value} is refused: expected" in err and right in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["hart"], "there is no scenario 'hart'"),
        (["--backend", "spark"], "--backend 'spark' is refused: expected inprocess or ray"),
        (["--seeds", "1,x"], "--seeds '1,x' is refused: expected whole numbers"),
        (["--seeds", "2,2"], "a seed occurs twice"),
        (["--run-config", "method=fedmd"], "strings in quotes"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(command, tmp_path, arguments, complaint):
    code, out, err = command("simulate", "--out", str(tmp_path / "run"), *arguments)
    assert code == 2 and out == "" and complaint in err
    assert "Traceback" not in err and not list(tmp_path.iterdir())


def test_a_folder_of_results_is_never_written_over(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("precious")
    code, _, err = command("simulate", "--out", str(tmp_path / "run"))
    assert code == 2 and f"{tmp_path / 'run'} is there already" in err
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_a_place_that_cannot_be_written_is_named(command, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = command("simulate", "--out", str(tmp_path / "file" / "run"))
    assert code == 2 and "file/run can't be written: Not a directory" in err


def test_a_folder_that_may_not_be_written_is_named(command, tmp_path):
    tmp_path.chmod(0o500)
    place = tmp_path if os.geteuid() else Path("/proc")  # root may write everywhere else
    code, _, err = command("simulate", "--out", str(place / "run"))
    tmp_path.chmod(0o700)
    assert code == 2 and f"{place / 'run'} can't be written: " in err


def test_a_second_run_in_the_same_place_is_refused_and_harms_nothing(command, tmp_path):
    with RunFolder.open(tmp_path / "run") as first:
        first.keep_model("student.safetensors", b"weights")
        code, _, err = command("simulate", "--out", str(tmp_path / "run"))
    assert code == 2 and "is being written by another run" in err
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(("text", "seeds"), [("0", [0]), ("0,1,2", [0, 1, 2]), (" 3 , 4", [3, 4])])
def test_seeds_are_numbers_with_commas(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", ",", "1,", "-1", "1.5", "a", "9223372036854775808", "1;2"])
def test_other_seeds_are_refused(text):
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


# ---- What is printed ----


def test_the_summary_alone_is_on_standard_output_and_keeps_the_contract(command, tmp_path):
    final = tmp_path / "run"
    code, out, err = command(
        "simulate", "heart", "--json", "--seeds", "0,1", "--out", str(final), "--run-config", "num-rounds=2"
    )
    assert code == 0
    summary = json.loads(out)
    assert out == (final / "summary.json").read_text()
    assert "2/2 auroc" in err  # the progress bar goes elsewhere
    assert summary["schema"] == 1 and summary["scenario"] == "heart" and summary["seeds"] == [0, 1]
    contenders = {
        "teacher_alone",
        "public_only",
        "public_only_if_labelled",
        "sites_alone",
        "sites_alone_each",
        "federation",
        "pooled_dp",
        "pooled_no_privacy",
    }
    assert contenders <= set(summary["results"])
    each = summary["results"]["sites_alone_each"]
    assert set(each) == {"cleveland", "hungary", "switzerland", "long-beach"}
    for contender in [
        *(summary["results"][name] for name in contenders - {"sites_alone_each"}),
        *each.values(),
    ]:
        for metric in ("auroc", "accuracy"):
            score = contender[metric]
            assert set(score) == {"mean", "std", "values"} and len(score["values"]) == 2
            assert all(0 <= value <= 1 for value in score["values"])
    assert [line["site"] for line in summary["privacy"]] == [
        "cleveland",
        "hungary",
        "long-beach",
        "switzerland",
    ]
    for line in summary["privacy"]:
        assert 0.9 < line["epsilon"] <= 1 and line["delta"] == 1e-5
        assert (line["unit"], line["adjacency"], line["accountant"]) == (
            "record",
            "add-remove",
            "gaussian-exact",
        )
    sizes = summary["bytes_up_per_site_per_round"]
    assert 121 < sizes["mean"] <= sizes["max"] <= 121 + CODECS["int8"].longest(184, 2)
    assert summary["wire_bytes_up_per_site_per_round"]["max"] > sizes["max"]
    assert summary["rounds"] == 2 and summary["seconds"] > 0 and summary["peak_memory_mib"] > 0


def test_a_person_sees_a_table_and_where_the_report_is(command, tmp_path):
    code, out, err = command("simulate", "--out", str(tmp_path / "run"), "--run-config", "num-rounds=1")
    assert code == 0
    assert "Federation" in out and "ε = " in out and str(tmp_path / "run" / "report.html") in out
    assert "1/1" in err and "auroc" in err
    assert (tmp_path / "run" / "report.html").exists()


def test_without_a_name_runs_lie_side_by_side(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert command("simulate", "--run-config", "num-rounds=1")[0] == 0
    assert command("simulate", "--run-config", 'num-rounds=1 run-id="mine" out="else"')[0] == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2 and all(name.endswith("-heart") for name in names)
    assert [path.name for path in (tmp_path / "else").iterdir()] == ["mine"]


# ---- What interrupts it ----


def running(folder: Path) -> "subprocess.Popen[str]":
    """Start a run that would take very long, and wait until it is in its rounds."""
    process = start(folder, "--out", "run", "--run-config", "num-rounds=10000")
    rounds = folder / ".run.partial" / ".seed-0.partial" / "rounds.jsonl"
    deadline = time.monotonic() + 60
    while not rounds.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("signal_sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_leaves_nothing(command, tmp_path, signal_sent, code):
    process = running(tmp_path)
    second, _, err = command("simulate", "--out", str(tmp_path / "run"))
    assert second == 2 and "is being written by another run" in err
    process.send_signal(signal_sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.rstrip().endswith("interrupted; nothing half-written is left") and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_run_does_not_stand_in_the_way_of_the_next(command, tmp_path):
    process = running(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    assert command("simulate", "--out", str(tmp_path / "run"), "--run-config", "num-rounds=1")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_called_that_and_leaves_no_results(command, small_disk):
    code, _, err = command("simulate", "--out", str(small_disk / "run"))
    assert code == 2 and f"{small_disk / 'run'} can't be written: the disk is full" in err
    assert "Traceback" not in err and not list(small_disk.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("largest", [1_000, 20_000, 40_000])
def test_a_file_that_may_not_grow_stops_the_run(tmp_path, largest):
    """As on a disk that fills up at that moment, for the proxy, the ledgers, the report."""
    process = start(
        tmp_path,
        *("--out", "run", "--run-config", "num-rounds=2"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "grandrounds: " in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_a_command_without_a_word():
    """Standard output is a pipe that nobody reads any more when the command has something to say."""
    command = [sys.executable, "-m", "grandrounds", "--help"]
    unheard = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=unheard, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
