"""The Ray backend runs Flower for real, and what it says about a run is true."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig, Scalar
from common.errors import UserError
from simulations import ray_backend
from simulations.benchmarks.noop_app import noop
from simulations.benchmarks.rounds import NOOP_APP
from simulations.inprocess import run_inprocess
from simulations.ray_backend import find_project, run_ray, tail, toml

CONFIG: dict[str, Scalar] = {
    "rounds": 3,
    "nodes": 3,
    "payload": 1000,
    "record": "record.json",  # relative: the apps work where the caller does
    "failing-node": 1,
    "fail": False,
}
TURNS = [[1, 1, -1], [2, 2, -1], [3, 3, -1]]


@pytest.mark.slow
def test_ray_and_inprocess_agree_and_a_run_that_succeeded_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_ray(NOOP_APP, CONFIG, 3, tmp_path / "ray.log")
    assert json.loads(Path("record.json").read_text())["turns"] == TURNS
    Path("record.json").unlink()
    run_inprocess(CONFIG, 3, noop.server_app, noop.client_app)
    assert json.loads(Path("record.json").read_text())["turns"] == TURNS
    assert "told to fail" in Path("ray.log").read_text()  # the failing node's own exception


@pytest.mark.slow
def test_a_run_that_failed_raises_with_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "ray.log"
    config = CONFIG | {"fail": True, "record": "", "rounds": 1}
    with pytest.raises(UserError, match=r"finished:failed.*the no-op app was told to fail") as raised:
        run_ray(NOOP_APP, config, 3, log)
    assert str(log) in str(raised.value) and "\x1b" not in str(raised.value)


@pytest.mark.slow
def test_a_key_that_the_app_lacks_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Invalid run configuration"):
        run_ray(NOOP_APP, CONFIG | {"no-such-key": 1}, 3, tmp_path / "ray.log")


def test_the_project_is_found_around_the_package() -> None:
    assert (find_project() / "simulations" / "ray_backend.py").is_file()


def test_a_project_that_is_not_there_is_missed_in_plain_words(tmp_path: Path) -> None:
    """As when only the packages are installed and the working directory is somewhere else."""
    here = find_project()
    for package in ("common", "simulations"):
        shutil.copytree(here / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "someone-elses"\n')
    script = "from simulations.ray_backend import find_project; find_project()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UserError: the ray backend needs the project's own folder" in done.stderr
    assert str(tmp_path) in done.stderr


text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.one_of(
    text, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
)


@given(st.dictionaries(st.sampled_from(sorted(RunConfig().flat())), scalars))
def test_toml_says_what_the_run_config_says(run_config: dict[str, Scalar]) -> None:
    def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
        leaves: dict[str, object] = {}
        for key, value in tree.items():
            leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return leaves

    read = flat(tomllib.loads(toml(run_config)))
    assert read == run_config
    assert {key: type(value) for key, value in read.items()} == {k: type(v) for k, v in run_config.items()}


def test_tail_is_the_end_without_colours(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(f"\x1b[92mline {i}\x1b[0m" for i in range(100)))
    assert tail(log, 2) == "line 98\nline 99"
    assert len(tail(log).splitlines()) == ray_backend.TAIL_LINES
