"""The custodian is killed (kill -9) at random instants of a task, and what it did and said still adds up.

Each instant kills a real process that serves a real site. So that two hundred of them take a minute and not
an hour, they are forked from a nursery that has imported torch already. The nursery's custodians write a
line before they read records, by which the test knows what was really done.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from client.books import verify
from client.ledger import Ledger
from common.accounting import epsilon
from common.messages import Receipt, Refusal, Release, Rule, decode_answer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NURSERY = """
import os, signal, sys
from pathlib import Path
import torch, torch._dynamo  # what a first lesson would import
from client import student
from client.policy import read_policy
from client.private_data import PrivateRecords
from client.served import open_site
from client.service import serve

torch.set_num_threads(1)
policy, reads = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
original = student.Student.private_lesson

def witnessed(self, task, *arguments):
    os.write(reads, f"{task.round}\\n".encode())
    return original(self, task, *arguments)

student.Student.private_lesson = witnessed
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        with open_site(read_policy(policy)) as site:
            serve(site)
        os._exit(0)
    print(pid, flush=True)
"""


@dataclass
class Nursery:
    """Starts custodians quickly, and ends them at once."""

    hospital: "object"
    process: subprocess.Popen[str]
    reads: Path
    pid: int = 0

    def start(self) -> float:
        """Start a custodian and return how long it took until it was healthy."""
        began = time.monotonic()
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        while not self.hospital.is_healthy(0.5):
            assert time.monotonic() - began < 20
            time.sleep(0.005)
        return time.monotonic() - began

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        while Path(f"/proc/{self.pid}").exists():
            time.sleep(0.001)

    def times_read(self) -> Counter[int]:
        return Counter(map(int, self.reads.read_text().split())) if self.reads.exists() else Counter()


@pytest.fixture
def nursery(hospital, tmp_path) -> Iterator[Nursery]:
    reads = tmp_path / "reads"
    command = [sys.executable, "-c", NURSERY, str(hospital.policy_path), str(reads)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "nursery.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    nursery = Nursery(hospital, process, reads)
    yield nursery
    nursery.kill()
    process.kill()
    process.wait()


def charges(ledger: Ledger) -> Counter[int]:
    return Counter(entry.body["round"] for entry in ledger.entries() if entry.kind == "charge")


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_hundred_instants_of_a_task(hospital, nursery, seed):
    rng, instants = random.Random(seed), 100
    plan = hospital.plan(rounds=instants + 1, epsilon=0.5)
    nursery.start()
    assert isinstance(decode_answer(hospital.connect().accept_proxy(hospital.proxy.to_bytes())), Receipt)
    hospital.connect().learn(hospital.task(instants + 1, plan).encode())  # the first task builds the student
    survived = 0
    span = 0.1
    with ThreadPoolExecutor() as pool:
        for round_number in range(1, instants + 1):
            task = hospital.task(round_number, plan).encode()
            asking = pool.submit(hospital.connect(patience=0.5).learn, task)
            time.sleep(rng.uniform(0, span))
            nursery.kill()
            first = decode_answer(asking.result())
            assert nursery.start() < 2.0
            with hospital.open_beside() as site:
                before = charges(site.ledger)[round_number]
            again = hospital.connect().learn(task)
            assert isinstance(decode_answer(again), Release)
            with hospital.open_beside() as site:
                after = charges(site.ledger)[round_number]
            if isinstance(first, Release):
                survived += 1
                assert again == first.encode(), "a committed task was answered with other bytes"
                assert after == before == 1, "a committed task was charged twice"
            else:
                assert isinstance(first, Refusal) and first.rule is Rule.UNAVAILABLE
            assert hospital.connect().learn(task) == again
            # Aim at where it hurts: keep about half of the kills before the reply and half after it.
            span = min(max(span * (0.95 if isinstance(first, Release) else 1.05), 0.02), 0.5)
    assert 0 < survived < instants
    done, charged = nursery.times_read(), charges_of(hospital)
    assert all(done[number] <= charged[number] <= 2 for number in range(1, instants + 1))
    with hospital.open_beside() as site:
        verdict = verify(site.ledger, site.releases)
        assert verdict.findings == ()
        assert epsilon(site.ledger.events(), 1e-5)[0] <= 3.0


def charges_of(hospital) -> Counter[int]:
    with hospital.open_beside() as site:
        return charges(site.ledger)
