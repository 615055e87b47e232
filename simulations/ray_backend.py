"""The same app through Flower's own door: `flwr run` with Ray.

What a Flower user does by hand, done so that it leaves nothing behind and tells the truth:

1. A SuperLink of our own on a free port, with its own `FLWR_HOME` in a temporary folder, so that neither
   the user's Flower configuration nor a SuperLink that already runs takes part. Flower's habit of building
   a new environment with all dependencies for each run is switched off: the present one is right.
2. `flwr run` submits the project's folder; `flwr log` follows the run into a log file.
3. `flwr list` says how the run ended. The exit code of a streamed run doesn't: it is 0 for a failed one too.
4. Whatever happened, Ctrl-C included, the SuperLink and all that it started are stopped.

Ray takes 10 to 20 s to start; `simulations.inprocess` gives the same result without.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.config import Scalar
from common.errors import UserError
from common.run_config_files import as_toml

CONNECTION = "simulation"
START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0
TAIL_LINES = 15

ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the new default; unset, every worker prints a FutureWarning
    "RAY_USAGE_STATS_ENABLED": "0",
    # One thread per node, as in process: sums come out the same, and cores aren't fought over.
    "OMP_NUM_THREADS": "1",
}


def run_ray(
    project_dir: Path,
    run_config: Mapping[str, Scalar],
    num_nodes: int,
    log_file: Path,
    cpus_per_node: int = 1,
) -> None:
    """Run a Flower app with Ray and wait until it has ended.

    The apps' working directory is that of this process, so relative paths in `run_config` mean what the
    user thinks they mean.

    Args:
        project_dir: Folder of the Flower app; see `server.federation.bundle`.
        run_config: Overrides of the app's run config. Flower takes only keys that the app's
            `pyproject.toml` has.
        num_nodes: How many simulated nodes there are.
        log_file: Gets what the apps and Flower log, as it happens.
        cpus_per_node: Cores that Ray reserves for a working node: the machine's cores divided by this work
            at once.

    Raises:
        UserError: if Flower could not start, refused the run, or the run failed, with the reason and the
            end of the log.
    """
    with tempfile.TemporaryDirectory(prefix="grandrounds-ray-", ignore_cleanup_errors=True) as home_name:
        home = Path(home_name)
        overrides = home / "run-config.toml"
        overrides.write_text(as_toml(run_config), encoding="utf-8")
        with log_file.open("w", encoding="utf-8") as log, _superlink(home) as environment:
            nodes = {
                "num-supernodes": num_nodes,
                "client-resources-num-cpus": cpus_per_node,
                "init-args-log-to-driver": False,
            }
            arguments = [str(project_dir.resolve()), CONNECTION, "--run-config", str(overrides)]
            settings = " ".join(f"{key}={json.dumps(value)}" for key, value in nodes.items())
            run_id = _flwr(environment, "run", *arguments, "--federation-config", settings)["run-id"]
            while True:
                # The stream ends with the run, or when the connection breaks.
                _command(environment, ["log", run_id, CONNECTION, "--stream"], stdout=log)
                status = _flwr(environment, "list", CONNECTION, "--run-id", run_id)["runs"][0]
                if status["status"].startswith("finished"):
                    break
    if status["status"] != "finished:completed":
        raise UserError(
            f"the Flower run ended as {status['status']!r}: {status['status-details'] or 'no reason given'}\n"
            f"{tail(log_file)}\nThe whole log is in {log_file}"
        )


def tail(log_file: Path, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log, without Flower's colours."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", log_file.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(plain.splitlines()[-lines:])


@contextlib.contextmanager
def _superlink(home: Path) -> Iterator[dict[str, str]]:
    """Run a SuperLink under `home`; yield the environment in which `flwr` finds it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n'
        f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n',
        encoding="utf-8",
    )
    programs = Path(sys.executable).parent  # not resolved: in a virtual environment this is a link
    environment = os.environ | ENVIRONMENT
    environment |= {"FLWR_HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}
    log_file = home / "superlink.log"
    command = [str(programs / "flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    lock_file = home / "lock"
    lock_file.touch()
    with log_file.open("w", encoding="utf-8") as log, lock_file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # for `_stop`
        # A session of its own, so that Ctrl-C in the terminal reaches us alone.
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdin=lock,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not _answers(f"http://{address}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"Flower's SuperLink did not start on {address}:\n{tail(log_file)}")
            time.sleep(0.1)
        yield environment
    finally:
        _stop(process, lock_file)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


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


def _command(
    environment: dict[str, str], arguments: list[str], **streams: Any
) -> "subprocess.CompletedProcess[str]":
    program = str(Path(sys.executable).parent / "flwr")
    return subprocess.run(
        [program, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **streams,
    )


def _flwr(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """Run a `flwr` command that answers in JSON.

    Raises:
        UserError: with what it said, if it failed.
    """
    done = _command(environment, [*arguments, "--format", "json"], stdout=subprocess.PIPE)
    answer: dict[str, Any] = {}
    with contextlib.suppress(json.JSONDecodeError):
        answer = json.loads(done.stdout)
    if not answer.get("success"):
        reason = answer.get("error-message") or done.stdout
        raise UserError(f"flwr {arguments[0]} failed: {reason.strip()}")
    return answer
