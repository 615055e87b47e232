"""A small hospital for tests: a founded site with made-up patients, and what a coordinator would send it."""

import contextlib
import datetime
import ipaddress
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
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.connection import OPTIONS, Connection
from client.founding import Choices, found
from client.policy import read_policy
from client.served import ServedSite, open_ledger, open_site, site_of
from common.config import RunConfig
from common.messages import Task
from common.plan import Plan, plan_of
from common.preprocessing import NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
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
        (folder / "patients.csv").write_text(as_csv(patients(60) if records is None else records))
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
        config = RunConfig.from_run_config(
            {"num-rounds": 3, "privacy.unit": "patient", "privacy.epsilon": 1.0}
        )
        plan = plan_of(
            config,
            study="study-1",
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

    def open(self) -> contextlib.AbstractContextManager[ServedSite]:
        """Open the site in this process, without a service."""
        return open_site(read_policy(self.policy_path))

    @contextlib.contextmanager
    def open_beside(self) -> Iterator[ServedSite]:
        """Open the same site once more, as a second process without the lock on its state would."""
        policy = read_policy(self.policy_path)
        with open_ledger(policy) as ledger:
            yield site_of(policy, ledger)

    def connect(self, patience: float = 10.0) -> Connection:
        return Connection(grpc.insecure_channel(self.address, [*OPTIONS, FRESH]), patience)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start a custodian in a process of its own; its log goes to serve.log."""
        with (self.folder / "serve.log").open("ab") as log:
            return subprocess.Popen(self._command("serve", *options), env=ENVIRONMENT, stderr=log, stdout=log)

    def run(self, *command: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        """Run `grandrounds site …` on this site's policy."""
        return subprocess.run(
            self._command(*command),
            env=ENVIRONMENT,
            input=answer,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def _command(self, *command: str) -> list[str]:
        return [sys.executable, "-m", "grandrounds", "site", *command, "--policy", str(self.policy_path)]

    def is_healthy(self, timeout: float = 2.0) -> bool:
        """Ask the standard health service, by a connection of its own."""
        with grpc.insecure_channel(self.address, [FRESH]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    @contextlib.contextmanager
    def served(self, *options: str) -> Iterator["Served"]:
        """A custodian in a process of its own, from healthy to ended."""
        process = self.start(*options)
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


@dataclass
class Served:
    """A custodian that runs."""

    hospital: Hospital
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return (self.hospital.folder / "serve.log").read_text()

    def health(self, timeout: float = 2.0) -> bool:
        return self.hospital.is_healthy(timeout)

    def wait_until_healthy(self, timeout: float = 20.0) -> None:
        began = time.monotonic()
        while not self.health(0.5):
            assert self.process.poll() is None, self.log
            assert time.monotonic() - began < timeout, self.log
            time.sleep(0.01)


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital.found(tmp_path / "north")


@pytest.fixture(scope="session")
def found_at() -> Callable[..., Hospital]:
    """Found a hospital in a folder, with records of its own if they are given."""
    return Hospital.found


@pytest.fixture(scope="session")
def certify() -> Callable[[Path], None]:
    """Write certificates into a folder: an authority's, and a courier's and a custodian's that it signed."""

    def write(folder: Path) -> None:
        authority = certificate(folder, "ca")
        certificate(folder, "courier", authority)
        certificate(folder, "custodian", authority)

    return write


def certificate(folder: Path, name: str, authority: tuple | None = None) -> tuple:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signing = (subject, key) if authority is None else (authority[0].subject, authority[1])
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .sign(signing, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / f"{name}.crt").write_bytes(signed.public_bytes(pem))
    secret = os.open(folder / f"{name}.key", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(secret, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    os.close(secret)
    return signed, key


@pytest.fixture(scope="session")
def patients_of() -> Callable[..., Records]:
    """Made-up patients, as many as wanted."""
    return patients
