"""A SuperLink of our own on this machine, in plain text on a free port, that leaves nothing behind.

It has an `FLWR_HOME` of its own, so that neither the user's Flower configuration nor a SuperLink that already
runs takes part. Flower's habit of building a new environment with all dependencies for each run is switched
off: the present one is right.
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from common.errors import UserError
from server import flower_programs
from server.flower_programs import answers, program, tail

START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink that runs.

    Attributes:
        pid: Its process.
        address: Where it listens.
        environment: In which `flwr` finds it, by the name that it was given.
    """

    pid: int
    address: str
    environment: dict[str, str]


@contextlib.contextmanager
def superlink(
    home: Path, connection: str, *arguments: str, more: Mapping[str, str] = MappingProxyType({})
) -> Iterator[SuperLink]:
    """Run a SuperLink.

    Args:
        home: Its `FLWR_HOME`, a folder that nothing else uses.
        connection: What `flwr` knows it by.
        arguments: Of `flower-superlink`, beyond its address.
        more: What its environment has beyond the usual.

    Raises:
        UserError: if it does not start, with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{connection}"\n'
        f'[superlink.{connection}]\naddress = "{address}"\ninsecure = true\n',
        encoding="utf-8",
    )
    environment = flower_programs.environment(home) | dict(more)
    log_file = home / "superlink.log"
    lock_file = home / "lock"
    lock_file.touch()
    with log_file.open("w", encoding="utf-8") as log, lock_file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # for `_stop`
        # A session of its own, so that Ctrl-C in the terminal reaches us alone.
        process = subprocess.Popen(
            [
                program("flower-superlink"),
                "--insecure",
                *arguments,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            env=environment,
            stdin=lock,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not answers(f"http://{address}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"Flower's SuperLink did not start on {address}:\n{tail(log_file)}")
            time.sleep(0.1)
        yield SuperLink(process.pid, address, environment)
    finally:
        _stop(process, lock_file)


def _stop(superlink: subprocess.Popen[bytes], lock_file: Path) -> None:
    """End the SuperLink and wait for what it started.

    Its executors, which have sessions of their own, miss it and end by themselves. They inherited the
    locked file as their standard input, and with it the lock, so it is free when the last of them is gone.
    """
    for how in (signal.SIGTERM, signal.SIGKILL):
        if superlink.poll() is None:
            os.killpg(superlink.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                superlink.wait(STOP_TIMEOUT)
    deadline = time.monotonic() + STOP_TIMEOUT
    with lock_file.open() as lock:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.1)
