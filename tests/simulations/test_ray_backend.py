"""The Ray backend runs Flower for real, and what it says about a run is true."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import Scalar
from common.errors import UserError
from simulations.benchmarks.noop_app import noop
from simulations.benchmarks.rounds import NOOP_APP
from simulations.inprocess import run_inprocess
from simulations.ray_backend import run_ray

CONFIG: dict[str, Scalar] = {
    "rounds": 3,
    "nodes": 3,
    "payload": 1000,
    "record": "record.json",  # relative: the apps work where the caller does
    "failing-node": 1,
    "fail": False,
}
TURNS = [[1, 1, -1], [2, 2, -1], [3, 3, -1]]


def test_inprocess_takes_the_turns_that_ray_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_inprocess(CONFIG, 3, noop.server_app, noop.client_app)
    assert json.loads(Path("record.json").read_text())["turns"] == TURNS


@pytest.mark.slow
def test_a_run_goes_to_the_ray_cluster_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = str(Path(sys.executable).parent / "ray")
    # RAY_TMPDIR keeps other runs on this machine from finding this cluster by themselves.
    monkeypatch.setenv("RAY_TMPDIR", str(short := Path(f"/tmp/ray-{os.getpid()}")))
    head = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    cluster = subprocess.Popen(head, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert cluster.stdout is not None
        assert any("Ray runtime started" in line for line in cluster.stdout)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.delenv("RAY_TMPDIR")
        run_ray(NOOP_APP, CONFIG, 3, tmp_path / "ray.log")
        assert json.loads(Path("record.json").read_text())["turns"] == TURNS
        assert "told to fail" in Path("ray.log").read_text()  # the failing node's own exception
        assert "ClientAppActor" in "".join(
            log.read_text() for log in short.glob("ray/session_*/logs/worker-*.out")
        )
    finally:
        cluster.terminate()
        cluster.wait(30)
        shutil.rmtree(short, ignore_errors=True)


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
