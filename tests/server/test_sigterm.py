"""A server app that is told to end does so at once, also while it waits for a site."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.simulated import close_sites
from common.runs import CHECKPOINT, working_folder
from simulations.inprocess import run_inprocess

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
PROGRAM = """
import json, sys
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.supercore.exit import register_signal_handlers
from flwr.supercore.telemetry import EventType
from client.app import app
from simulations.inprocess import run_inprocess

class NoAnswer(ClientApp):
    def __call__(self, message, context):
        if context.node_config["partition-id"] == 1 and message.metadata.group_id == "2":
            message.metadata.__dict__["_message_id"] = "another"
        return app(message, context)

# As Flower's own program for server apps does.
register_signal_handlers(event_type=EventType.FLWR_SERVERAPP_RUN_LEAVE)
run_inprocess(json.loads(sys.argv[1]), 4, None, NoAnswer())
"""


def test_sigterm_ends_a_run_that_waits_for_a_site_and_the_run_goes_on_later(tmp_path):
    settings = {"out": str(tmp_path), "run-id": "trial", "resumable": True, "num-rounds": 3}
    with (tmp_path.parent / f"{tmp_path.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(settings)], env=ENVIRONMENT, stdout=log, stderr=log
        )
        rounds, deadline = working_folder(tmp_path / "trial") / "rounds.jsonl", time.monotonic() + 60
        while not rounds.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(1)  # round 2 waits for ten minutes
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
        log.seek(0)
        shown = log.read()
    assert "round 1 of 3" in shown and "Traceback" not in shown
    assert (working_folder(tmp_path / "trial") / CHECKPOINT).exists()
    try:
        run_inprocess(settings, 4)
    finally:
        close_sites()
    lines = (tmp_path / "trial" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]
    assert all(len(json.loads(line)["answered"]) == 4 for line in lines)
