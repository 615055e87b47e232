"""A study with two hospitals: their custodians are founded, checked and served by what people type.

The server app and the courier are the real ones; only Flower's network between them is the in-process grid.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import app as courier
from common.config import RunConfig
from common.summary import read
from simulations.inprocess import run_inprocess

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SITES = {"north": 90, "south": 40}
COLUMNS = """\
target = "ill"
classes = ["no", "yes"]
patient = "patient"

[[features]]
name = "age"
kind = "numeric"

[[features]]
name = "sugar"
kind = "numeric"
"""


def table(path: Path, rows: int, seed: int, labelled: int | None = None) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal([60.0, 7.0], [12.0, 2.0], size=(rows, 2))
    ill = (values - [60.0, 7.0]) @ [0.1, 0.5] + rng.normal(size=rows) > 0
    lines = ["patient,ill,age,sugar"]
    for row in range(rows):
        label = ("yes" if ill[row] else "no") if labelled is None or row < labelled else ""
        lines.append(f"p{row // 2},{label},{values[row, 0]:.3f},{values[row, 1]:.3f}")
    path.write_text("\n".join(lines) + "\n")


def grandrounds(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grandrounds", *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def found(folder: Path, name: str, seed: int) -> Path:
    """Found a site and return its policy."""
    folder.mkdir()
    table(folder / "patients.csv", 2 * SITES[name], seed)
    site = f'[sites.{name}]\ndeclared-size = {SITES[name]}\nfile = "patients.csv"\n'
    (folder / "data.toml").write_text(f"{COLUMNS}\n{site}")
    answers = ["--name", name, "--data", str(folder / "data.toml"), "--unit", "patient", "--study", "trial"]
    answers += ["--declared-size", str(SITES[name]), "--lifetime-epsilon", "2", "--run-epsilon", "1"]
    done = grandrounds("site", "init", str(folder / "site"), *answers)
    assert done.returncode == 0, done.stderr
    policy = folder / "site" / "site.toml"
    text = policy.read_text().replace("approval = true", "approval = false")
    policy.write_text(text.replace("every-seconds = 30.0", "every-seconds = 0.0"))
    checked = grandrounds("site", "check", "--policy", str(policy))
    assert checked.returncode == 0, checked.stdout
    return policy


@contextlib.contextmanager
def served(policy: Path) -> Iterator[str]:
    """Serve a site; give the address of its socket."""
    with (policy.parent / "serve.log").open("wb") as log:
        command = [sys.executable, "-m", "grandrounds", "site", "serve", "--policy", str(policy)]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        yield f"unix:{policy.parent}/custodian.sock"
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0, (policy.parent / "serve.log").read_text()


class AtHospitals(ClientApp):
    """The real courier, each node with the node config that its hospital gave it."""

    def __init__(self, sockets: list[str]) -> None:
        super().__init__()
        self.sockets = sockets

    def __call__(self, message: Message, context: Context) -> Message:
        place = int(context.node_config["partition-id"])
        context.node_config = {"custodian": self.sockets[place]}
        return courier(message, context)


@pytest.mark.slow
def test_a_study_runs_through_served_custodians_and_asked_again_gives_the_same_bits_for_free(tmp_path):
    policies = [found(tmp_path / name, name, seed) for seed, name in enumerate(SITES)]
    coordinator = tmp_path / "coordinator"
    coordinator.mkdir()
    table(coordinator / "proxy.csv", 60, 10, labelled=20)
    table(coordinator / "test.csv", 200, 11)
    declared = "\n".join(f"[sites.{name}]\ndeclared-size = {size}" for name, size in SITES.items())
    public = '[public-files]\nproxy = "proxy.csv"\ntest = "test.csv"\n'
    (coordinator / "data.toml").write_text(f"{COLUMNS}\n{declared}\n\n{public}")
    config = RunConfig.from_run_config(
        {
            "scenario": "own",
            "data.description": str(coordinator / "data.toml"),
            "privacy.unit": "patient",
            "num-rounds": 3,
            "min-sites": 2,
            "run-id": "trial",
        }
    )

    def run(out: str) -> Path:
        changed = config.model_copy(update={"out": str(tmp_path / out)})
        run_inprocess(changed.flat(), len(SITES), None, AtHospitals(sockets))
        return tmp_path / out / "trial"

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(served(policy)) for policy in policies]
        first, again = run("first"), run("again")

    summary = read(first / "summary.json")
    assert [line.answered for line in summary.history] == [("north", "south")] * 3
    assert {line.site: (line.unit, line.epsilon <= 1.0) for line in summary.privacy} == dict.fromkeys(
        SITES, ("patient", True)
    )
    assert summary.results.federation["auroc"].mean > 0.7
    assert summary.results.pooled_dp is None and summary.results.sites_alone is None
    for model in ("teacher.safetensors", "student.safetensors"):
        assert (first / model).read_bytes() == (again / model).read_bytes()
    for policy in policies:
        assert (policy.parent / "state" / "student.safetensors").read_bytes() == (
            first / "student.safetensors"
        ).read_bytes()
        verified = grandrounds("site", "verify", "--policy", str(policy))
        assert verified.returncode == 0, verified.stdout
        assert "Releases in the ledger: 3; sent, by the log of releases: 3." in verified.stdout
        ledger = json.loads(grandrounds("site", "ledger", "--policy", str(policy), "--json").stdout)
        kinds = [entry["kind"] for entry in ledger["entries"]]
        assert kinds.count("reserve") == 1 and kinds.count("charge") == 3 and kinds.count("commit") == 3
