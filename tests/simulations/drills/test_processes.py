"""Programs of a drill come back when they end, and nothing but what it started is ever ended."""

import os
import subprocess
import sys
import time

import pytest

from simulations.drills.local import wait
from simulations.drills.processes import Program, Services, descendants, kill

ASLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
PARENT = [sys.executable, "-c", f"import subprocess; subprocess.run({ASLEEP!r})"]


@pytest.fixture
def program(tmp_path) -> Program:
    return Program(PARENT, tmp_path / "log", os.environ, rest=0.1)


def test_a_program_that_is_killed_is_started_again_and_a_retired_one_is_not(program):
    with Services() as services:
        services.run("one", program)
        first = program.pid
        kill([first])
        assert wait(lambda: program.pid not in (None, first), 10.0, 0.05) and program.starts == 2
        services.retire("one")
        time.sleep(0.5)
        assert program.pid is None and program.starts == 2


def test_a_power_cut_ends_everything_that_was_started_orphans_too_and_nothing_else(program):
    other = subprocess.Popen(ASLEEP)
    try:
        with Services() as services:
            services.run("one", program)
            assert wait(lambda: len(services.processes()) == 2, 10.0, 0.05)
            (orphan,) = descendants(program.pid)
            kill([program.pid])
            with services.power_cut():
                assert wait(lambda: not services.processes(), 10.0, 0.05)
                time.sleep(0.5)
                assert not services.processes()
            assert wait(lambda: len(services.processes()) == 2, 10.0, 0.05)
            assert orphan not in services.processes()
        assert not services.processes() and other.poll() is None
    finally:
        other.kill()
        other.wait()
