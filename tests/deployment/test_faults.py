"""Whatever breaks in a deployment, studies complete or one line says why not, and the books are right.

Here at one instant each, with two sites; `python -m simulations.drills` does it at twenty (docs/faults.md).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from simulations.drills.kills import STRIKES
from simulations.drills.network import require_network

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, SITES = 8, 2


def drilled(*names: str) -> dict[str, Any]:
    """Hold drills in one federation, in a process that ends nothing but its own; return what was found."""
    numbers = ["--times", "1", "--sites", str(SITES), "--rounds", str(ROUNDS)]
    done = subprocess.run(
        [sys.executable, "-m", "simulations.drills", *names, *numbers, "--together", "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    (row,) = json.loads(done.stdout).values()
    assert not row["findings"], f"{row['findings']}\n{done.stderr}"
    assert done.returncode == 0
    return dict(row)


def test_a_study_survives_kill_9_of_every_program_and_of_all_at_once():
    row = drilled(*STRIKES)
    assert row["completed"] >= 1 and row["resumed"] >= 1
    assert row["charges"] >= ROUNDS


def test_a_study_goes_on_under_another_federation_with_the_same_ledgers():
    row = drilled("another-coordinator")
    assert row["completed"] == 1 and row["resumed"] >= 1
    assert row["charges"] and not row["repeated"]


@pytest.mark.machine
def test_lost_networks_full_disks_and_closed_doors_end_in_a_study_or_a_clear_line():
    try:
        require_network()
    except UserError as reason:
        pytest.fail(f"{reason}. Deselect this by -m 'not machine', and know that it is not tested")
    row = drilled("lost-network", "full-disk-site", "full-disk-coordinator", "doors")
    assert row["completed"] == 5 and row["resumed"] == 1
