"""The courier's programs at a site: Flower's SuperNode and its executor, started and ended together.

    SuperNode (client.supernode)             talks to the coordinator, keeps messages
      └ executor (client.pinned_executor)    starts, for every message,
          └ courier (client.pinned_app)      the agreed bundle's ClientApp, which talks to the custodian

If one of the two ends, so does the other and this program, with an exit code that makes systemd or Docker
start all of it again.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time

from client.courier_settings import CourierFolder
from client.first_contact import try_way

LOOK = 0.2
"""Seconds between two looks at the programs."""
PATIENCE = 5.0
"""Seconds that they have to end."""
EXECUTOR_LOOKS = 0.25
"""Seconds between the executor's two looks for a message."""

REFUSED = (
    "the SuperNode of %s has ended. If it was not activated, the coordinator's SuperLink doesn't know its "
    "key, or the SuperNode before it died less than a minute ago. It is to be started again"
)

log = logging.getLogger("grandrounds.courier")


def run_courier(folder: CourierFolder) -> int:
    """Run SuperNode and executor until one of them ends or SIGTERM comes; return the exit code.

    Raises:
        UserError: if the coordinator won't let this site in, as far as can be told beforehand.
    """
    try_way(folder)
    folder.flower_home.mkdir(parents=True, exist_ok=True, mode=0o700)
    port = _free_port()
    environment = os.environ | {
        "FLWR_HOME": str(folder.flower_home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(EXECUTOR_LOOKS),
    }
    programs: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:
        raise SystemExit(0)

    def start(command: list[str]) -> None:
        program = [sys.executable, "-P", "-m", *command]
        programs.append(subprocess.Popen(program, env=environment, cwd=folder.path, stdin=subprocess.DEVNULL))

    signal.signal(signal.SIGTERM, end)
    try:
        start(supernode_command(folder, port))
        # An executor that knocks too early waits ever longer until it knocks again.
        while programs[0].poll() is None and not _listens(port):
            time.sleep(LOOK)
        start(executor_command(folder, port))
        while all(program.poll() is None for program in programs):
            time.sleep(LOOK)
        if programs[0].poll():
            log.error(REFUSED, folder.settings.site)
        return next(program.returncode for program in programs if program.returncode is not None) or 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end(programs)


def supernode_command(folder: CourierFolder, port: int) -> list[str]:
    """The SuperNode's program and arguments."""
    return [
        *("client.supernode", str(folder.certificate), str(folder.certificate_key)),
        *("--superlink", folder.settings.address, "--root-certificates", str(folder.authority)),
        *("--auth-supernode-private-key", str(folder.node_key)),
        *("--node-config", f'custodian="{folder.settings.custodian}" site="{folder.settings.site}"'),
        *("--isolation", "process", "--host", "127.0.0.1", "--port", str(port)),
        *("--superexec-auth-secret-file", str(folder.executor_key)),
    ]


def executor_command(folder: CourierFolder, port: int) -> list[str]:
    """The executor's program and arguments."""
    return ["client.pinned_executor", folder.settings.bundle, f"127.0.0.1:{port}", str(folder.executor_key)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(programs: list[subprocess.Popen[bytes]]) -> None:
    for program in programs:
        program.terminate()
    deadline = time.monotonic() + PATIENCE
    for program in programs:
        try:
            program.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
