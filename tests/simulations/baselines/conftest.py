"""One seed's cases, read once: methods leave them as they are."""

import pytest

from common.config import RunConfig
from simulations.baselines.bench import Bench
from simulations.settings import run_settings


def configured(pairs: str = "") -> RunConfig:
    return run_settings("heart", [pairs])


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench.open(configured())
