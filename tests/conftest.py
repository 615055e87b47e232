"""Settings and fixtures that all tests share."""

import os

# Before anything imports torch: results and timings must not depend on how many cores there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports grpc: its threads, started again in a forked child, may abort it before it becomes
# the program that a test starts.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from common.config import RunConfig, Scalar
from common.logs import LOGGERS
from common.summary import Summary, read

if TYPE_CHECKING:  # slow to import, and most tests need none of it
    from flwr.app import Message
    from flwr.clientapp import ClientApp

settings.register_profile("tests", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tests")


@dataclass(frozen=True)
class Outcome:
    """What one run of the real apps left behind.

    Attributes:
        folder: The folder of results.
        replies: Every reply that reached the server, with the bytes that it came in.
    """

    folder: Path
    replies: "list[tuple[Message, bytes]]"

    @property
    def summary(self) -> Summary:
        return read(self.folder / "summary.json")

    @property
    def models(self) -> dict[str, bytes]:
        return {name: (self.folder / f"{name}.safetensors").read_bytes() for name in ("teacher", "student")}

    @property
    def auroc(self) -> float:
        return self.summary.results.federation["auroc"].mean

    def left_out(self, round_number: int) -> dict[str, str]:
        (line,) = (line for line in self.summary.history if line.round == round_number)
        return {one.site: one.reason for one in line.left_out}

    def epsilon(self, site: str) -> float:
        (line,) = (line for line in self.summary.privacy if line.site == site)
        return line.epsilon


RunApp = Callable[..., Outcome]


@pytest.fixture(scope="session")
def run_app(tmp_path_factory: pytest.TempPathFactory) -> RunApp:
    """Run the real ServerApp and ClientApp in this process: `heart`, two rounds, unless told otherwise."""
    from client.simulated import close_sites
    from common.datasets import sites
    from simulations.inprocess import run_inprocess
    from simulations.settings import run_settings

    numbers, out = count(), tmp_path_factory.mktemp("runs")

    def run(changes: Mapping[str, Scalar] | None = None, client_app: "ClientApp | None" = None) -> Outcome:
        name = f"run-{next(numbers)}"
        own = {"num-rounds": 2, "round-timeout": 5.0, "out": str(out), "run-id": name}
        config = RunConfig.from_run_config(run_settings("heart", []).flat() | own | (changes or {}))
        replies: list[tuple[Message, bytes]] = []
        try:
            run_inprocess(
                config.flat(), len(sites(config)), None, client_app, lambda *reply: replies.append(reply)
            )
        finally:
            close_sites()
        return Outcome(out / name, replies)

    return run


@pytest.fixture
def loggers_as_before() -> Iterator[None]:
    """Let a test change where lines of the log come out."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(one.handlers, one.propagate, one.level, [*one.filters]) for one in loggers]
    yield
    logging.captureWarnings(False)
    for one, (handlers, propagate, level, filters) in zip(loggers, before, strict=True):
        one.handlers, one.propagate, one.filters = handlers, propagate, filters
        one.setLevel(level)
