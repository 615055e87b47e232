"""Flower's own programs on this machine: where they lie, their environment, how `flwr` is asked."""

import contextlib
import json
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

from common.errors import UserError

ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the present environment is right
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    # One thread a program, as in process: sums come out the same, and cores aren't fought over.
    "OMP_NUM_THREADS": "1",
}
TAIL_LINES = 15


def program(name: str) -> str:
    """Path of one of Flower's programs, beside this Python's."""
    return str(Path(sys.executable).parent / name)  # not resolved: in a virtual environment this is a link


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's programs, with a home of ours."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | ENVIRONMENT | {"FLWR_HOME": str(home), "PATH": path}


def flwr(
    environment: dict[str, str], *arguments: str, stdout: int | IO[str], cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `flwr` to its end; what it says goes to `stdout`, errors too."""
    return subprocess.run(
        [program("flwr"), *arguments],
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def flwr_answer(environment: dict[str, str], *arguments: str, cwd: Path | None = None) -> dict[str, Any]:
    """Run a `flwr` command that answers in JSON.

    Raises:
        UserError: with what it said, if it failed.
    """
    done = flwr(environment, *arguments, "--format", "json", stdout=subprocess.PIPE, cwd=cwd)
    answer: dict[str, Any] = {}
    with contextlib.suppress(json.JSONDecodeError):
        answer = json.loads(done.stdout)
    if not answer.get("success"):
        reason = answer.get("error-message") or done.stdout
        raise UserError(f"flwr {arguments[0]} failed: {str(reason).strip()}")
    return answer


def answers(superlink: str, trusted: ssl.SSLContext | None = None) -> bool:
    """Whether a SuperLink answers at its URL, with a certificate that is trusted if it has one."""
    try:
        with urllib.request.urlopen(f"{superlink}/health", timeout=2, context=trusted) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def tail(log_file: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, without Flower's colours; nothing of one that isn't there."""
    try:
        text = log_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(re.sub("\x1b\\[[0-9;]*m", "", text).splitlines()[-lines:])
