"""A small hospital for tests: a founded site with a table of made-up patients, and what a coordinator would send it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.connection import OPTIONS, Connection
from client.founding import Choices, found
from common.config import RunConfig
from common.messages import Task
from common.plan import Plan, plan_of
from common.preprocessing import NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("no", "yes")
FEATURES = ("age", "pressure", "sugar")
DESCRIPTION = """\
target = "ill"
classes = ["no", "yes"]
patient = "patient"

[[features]]
name = "age"
kind = "numeric"

[[features]]
name = "pressure"
kind = "numeric"

[[features]]
name = "sugar"
kind = "numeric"

[sites.north]
declared-size = 50
file = "patients.csv"
"""


def patients(count: int, seed: int = 0) -> Records:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, len(FEATURES)))
    ill = values @ [1.0, -1.0, 0.5] + rng.normal(size=count) > 0
    return Records(
        columns={name: values[:, place] for place, name in enumerate(FEATURES)},
        target=np.where(ill, "yes", "no"),
        patients=np.array([f"p{number}" for number in range(count)]),
        groups={},
    )


def as_csv(records: Records) -> str:
    assert records.patients is not None
    lines = [f"patient,ill,{','.join(FEATURES)}"]
    for row in range(len(records)):
        values = ",".join(repr(float(records.columns[name][row])) for name in FEATURES)
        lines.append(f"{records.patients[row]},{records.target[row]},{values}")
    return "\n".join(lines) + "\n"


def make_proxy(seed: int = 1) -> Proxy:
    records = patients(24, seed)
    preprocessing = Preprocessing.fit(records, [NumericSpec(name=name) for name in FEATURES], CLASSES)
    cases = preprocessing.encode(records)
    return Proxy(preprocessing, x=cases.x, y=cases.y)


@dataclass
class Hospital:
    """A site's folder, and the coordinator's half of a conversation with it."""

    folder: Path
    proxy: Proxy = field(default_factory=make_proxy)

    @classmethod
    def found(cls, folder: Path, records: Records | None = None) -> "Hospital":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "patients.csv").write_text(as_csv(records or patients(60)))
        (folder / "data.toml").write_text(DESCRIPTION)
        choices = Choices(
            site="north",
            description="data.toml",
            unit="patient",
            declared_size=50,
            delta=1e-5,
            lifetime_epsilon=3.0,
            run_epsilon=1.0,
            studies=("*",),
            listen=f"unix:{folder}/door.sock",
        )
        found(folder, choices)
        hospital = cls(folder)
        hospital.amend({"approval = true": "approval = false", "every-seconds = 30.0": "every-seconds = 0.0"})
        return hospital

    @property
    def policy_path(self) -> Path:
        return self.folder / "site.toml"

    @property
    def address(self) -> str:
        return f"unix:{self.folder}/door.sock"

    def amend(self, changes: dict[str, str]) -> None:
        text = self.policy_path.read_text()
        for before, after in changes.items():
            assert before in text, before
            text = text.replace(before, after)
        self.policy_path.write_text(text)

    def plan(self, **changes: object) -> Plan:
        config = RunConfig.from_run_config({"num-rounds": 3, "privacy.unit": "patient", "privacy.epsilon": 1.0})
        plan = plan_of(
            config,
            study="study-1",
            returns="movement",
            buys_histogram=False,
            proxy_digest=self.proxy.digest,
            classes=len(CLASSES),
        )
        return Plan.model_validate(plan.model_dump() | changes)

    def task(self, round_number: int = 1, plan: Plan | None = None, seed: int = 0, **changes: object) -> Task:
        cases_P = np.arange(len(self.proxy), dtype=np.int32)
        logits_PC = np.random.default_rng([seed, round_number]).normal(size=(len(cases_P), len(CLASSES)))
        soft_PC = logits_PC - np.log(np.exp(logits_PC).sum(axis=1, keepdims=True))
        fields = {"cases_P": cases_P, "log_soft_labels_PC": soft_PC.astype(np.float16)} | changes
        return Task(plan or self.plan(), round_number, **fields)  # type: ignore[arg-type]

    def connect(self, patience: float = 10.0) -> Connection:
        return Connection(grpc.insecure_channel(self.address, [*OPTIONS, FRESH]), patience)

    @contextlib.contextmanager
    def served(self) -> Iterator["Served"]:
        process = start(self.policy_path)
        try:
            served = Served(self, process)
            served.wait_until_healthy()
            yield served
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            finally:
                process.kill()


FRESH = ("grpc.use_local_subchannel_pool", 1)
"""Each test's channel has a connection of its own."""


def start(policy: Path, log: Path | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "grandrounds", "site", "serve", "--policy", str(policy)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (log or policy.parent / "serve.log").open("ab") as output:
        return subprocess.Popen(command, cwd=policy.parent, env=environment, stderr=output, stdout=output)


@dataclass
class Served:
    """A custodian in a process of its own."""

    hospital: Hospital
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return (self.hospital.folder / "serve.log").read_text()

    def health(self, timeout: float = 2.0) -> bool:
        with grpc.insecure_channel(self.hospital.address, [FRESH]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_until_healthy(self, timeout: float = 20.0) -> float:
        began = time.monotonic()
        while not self.health(0.5):
            assert self.process.poll() is None, self.log
            assert time.monotonic() - began < timeout, self.log
            time.sleep(0.01)
        return time.monotonic() - began


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital.found(tmp_path / "north")


@pytest.fixture
def found_hospital(tmp_path: Path) -> Callable[..., Hospital]:
    """Found hospitals by name, each with records of its own."""
    return lambda name, records=None: Hospital.found(tmp_path / name, records)
