"""What the boundary between courier and custodian costs: a round in process beside one through the socket.

    python -m simulations.benchmarks.boundary [--rounds 150] [--json]

Two sites of the size of `fashion`'s, with that scenario's proxy, student and plan, learn the same tasks:
one's custodian is called in this process, the other's is served in a process of its own and asked over its
Unix socket as a courier asks. Their images are some of Fashion-MNIST's test set, which is as public as the
proxy. Both read, charge, train, commit and log for real; the schedule of replies, which exists to cost
time, is off.

The *floor* is a round in process and an empty call: as many bytes there and back over such a socket, to a
process that does nothing and has slept as long as a round takes. No custodian in a process of its own can be
quicker by gRPC, and how long a sleeping process takes to wake is the machine's.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import numpy as np
from rich.console import Console

from client.connection import connect
from client.custodian_pb2 import Body
from client.custodian_pb2_grpc import CustodianServicer, add_CustodianServicer_to_server
from client.founding import Choices, found
from client.policy import read_policy
from client.served import ServedSite, open_site
from common.config import RunConfig
from common.datasets import load_public
from common.datasets.scenario import PublicData
from common.errors import UserError
from common.messages import Release, Task, decode_answer
from common.plan import plan_of
from server.app import draw_up
from server.teacher import choose_cases
from simulations.settings import run_settings

TARGET_RATIO = 1.1
"""How much longer a round through the socket may take."""
IMAGES = 2400
TURN = 5
"""Rounds in a row; the first of them isn't counted."""
DESCRIPTION = """\
target = "label"
classes = {classes}

[[features]]
name = "pixels"
kind = "pixels"

[sites.bench]
declared-size = {images}
file = "images.npz"
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of a round and of an empty call, the medians over many."""

    inprocess: float
    socket: float
    empty: float
    ratio: float
    """Through the socket over in process."""
    floor: float
    """In process and an empty call over in process."""


def measure(rounds: int) -> Cost:
    """Time a round both ways, and an empty call.

    Raises:
        UserError: if Fashion-MNIST's files aren't there.
    """
    config = run_settings("fashion", [f"num-rounds={rounds}"])
    public = load_public(config)
    tasks = _tasks(config, public)
    with TemporaryDirectory() as folder:
        inside, outside = (_site(Path(folder) / name, public, config) for name in ("inside", "outside"))
        idle = Path(folder) / "idle.sock"
        with open_site(read_policy(inside)) as site, _served(outside):
            connection, nobody = connect(f"unix:{outside.parent}/custodian.sock"), connect(f"unix:{idle}")
            for one in (site.custodian, connection):
                one.accept_proxy(public.proxy.to_bytes())
            here = partial(_learn_here, site)
            took: list[list[float]] = [[], [], []]
            with _idle(idle, here(tasks[0])):
                # By turns, some rounds each, so that what else the machine does meets all alike.
                for first in range(0, rounds, TURN):
                    turn = tasks[first : first + TURN]
                    took[0] += [_seconds(here, task) for task in turn][1:]
                    took[1] += [_seconds(connection.learn, task) for task in turn][1:]
                    took[2] += [_seconds(nobody.learn, task, asleep=took[0][-1]) for task in turn][1:]
    inprocess, socket, empty = map(statistics.median, took)
    return Cost(inprocess, socket, empty, socket / inprocess, (inprocess + empty) / inprocess)


def _tasks(config: RunConfig, public: PublicData) -> list[bytes]:
    classes = len(public.proxy.preprocessing.classes)
    plan = plan_of(config, study="bench", proxy_digest=public.proxy.digest, classes=classes)
    cases_P = choose_cases(config, len(public.proxy))
    rng = np.random.default_rng(0)
    states = (rng.normal(size=(len(cases_P), classes)) for _ in range(plan.rounds))
    return [draw_up(plan, number, cases_P, z_PC).encode() for number, z_PC in enumerate(states, start=1)]


def _site(folder: Path, public: PublicData, config: RunConfig) -> Path:
    folder.mkdir()
    classes = public.proxy.preprocessing.classes
    images, labels = public.test.x[:IMAGES], public.test.y[:IMAGES]
    np.savez(
        folder / "images.npz", pixels=np.rint(images * 255).astype(np.uint8), label=np.array(classes)[labels]
    )
    (folder / "data.toml").write_text(DESCRIPTION.format(classes=json.dumps(classes), images=IMAGES))
    choices = Choices(
        site="bench",
        description="data.toml",
        unit=config.privacy.unit,
        declared_size=IMAGES,
        delta=config.privacy.delta,
        lifetime_epsilon=10 * config.privacy.epsilon,
        run_epsilon=config.privacy.epsilon,
        studies=("bench",),
        listen=f"unix:{folder}/custodian.sock",
    )
    policy = found(folder, choices)
    text = policy.read_text().replace("approval = true", "approval = false")
    policy.write_text(text.replace("every-seconds = 30.0", "every-seconds = 0.0"))
    return policy


@contextmanager
def _served(policy: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "grandrounds", "site", "serve", "--policy", str(policy)]
    with (policy.parent / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


class Nobody(CustodianServicer):
    """Answers every task with one release, and does nothing for it."""

    def __init__(self, release: bytes) -> None:
        """Take the answer."""
        self._release = release

    def Learn(self, request: Body, context: grpc.ServicerContext) -> Body:
        """Answer at once."""
        return Body(body=self._release)


def _answer_for_nobody(path: Path, release: bytes) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    add_CustodianServicer_to_server(Nobody(release), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{path}")
    server.start()
    server.wait_for_termination()


@contextmanager
def _idle(path: Path, release: bytes) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_answer_for_nobody, args=(path, release))
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _learn_here(site: ServedSite, body: bytes) -> bytes:
    """What the service does for a task, without a service."""
    release = site.custodian.learn(body)
    task = Task.decode(body)
    site.releases.note(task.plan.study, task.round, release)
    return release


def _seconds(learn: Callable[[bytes], bytes], task: bytes, asleep: float = 0.0) -> float:
    time.sleep(asleep)
    began = time.perf_counter()
    answer = decode_answer(learn(task))
    took = time.perf_counter() - began
    if not isinstance(answer, Release) or answer.steps == 0:
        raise RuntimeError(f"the custodian answered {answer}")
    return took


def main() -> None:
    """Measure and print; exit code 1 if the socket costs more than it may."""
    arguments = argparse.ArgumentParser(description="Time a round in process and through the socket.")
    arguments.add_argument("--rounds", type=int, default=150)
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    try:
        cost = measure(options.rounds)
    except UserError as error:  # Fashion-MNIST is not here
        sys.exit(f"{error}")
    if options.json:
        sys.stdout.write(json.dumps(asdict(cost)) + "\n")
    else:
        Console().print(
            f"in process {1000 * cost.inprocess:.1f} ms, through the socket {1000 * cost.socket:.1f} ms a "
            f"round: × {cost.ratio:.3f} (may be {TARGET_RATIO}); an empty call {1000 * cost.empty:.1f} ms, "
            f"floor × {cost.floor:.3f}",
            soft_wrap=True,
        )
    if cost.ratio > TARGET_RATIO:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
