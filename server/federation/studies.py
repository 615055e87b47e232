"""Running a study: submitted to the SuperLink, followed to its end, and told as it really ended.

`flwr run --stream` exits with 0 for a failed run too; what counts is what the SuperLink says of it.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from common.config import RunConfig
from common.errors import UserError
from common.run_config_files import INPUTS, as_toml, read_run_config
from server.federation import flower
from server.federation.bundle import require_agreed
from server.federation.settings import Federation

LOOK_AGAIN = 1.0
"""Seconds between two looks at a run that still goes on after its log has ended."""


def study_config(federation: Federation, sources: Sequence[str]) -> RunConfig:
    """Put a study's run configuration together, as it holds on the coordinator's machine.

    Args:
        federation: Where it runs.
        sources: TOML files or `key=value` pairs; paths in them start where the command is typed.

    Raises:
        UserError: naming what is wrong and where.
    """
    config = read_run_config(sources)
    if not config.run_id:
        raise UserError(
            "run-id is missing from the run config: it names the study, and sites approve it by name"
        )
    flat = config.flat()
    flat |= {key: str(Path(str(flat[key])).absolute()) for key in INPUTS if flat[key]}
    default = config.out == RunConfig().out
    flat["out"] = str(federation.runs if default else Path(config.out).absolute())
    config = RunConfig.from_run_config(flat)
    _require_sites(federation, config)
    return config


def submit(federation: Federation, config: RunConfig) -> int:
    """Hand a study to the SuperLink and return Flower's number for the run.

    Raises:
        UserError: if the app isn't the one that sites agreed on, results of that name are there, or the
            SuperLink refuses.
    """
    require_agreed(federation.app, federation.settings.bundle)
    final = Path(config.out) / config.run_id
    if final.exists():
        raise UserError(f"{final} is there already: choose another run-id, or move it away")
    flower.nodes(federation)  # says in our words if nobody answers
    with tempfile.TemporaryDirectory(prefix="grandrounds-") as folder:
        file = Path(folder) / "run-config.toml"
        file.write_text(as_toml(config.flat()), encoding="utf-8")
        command = [
            "run",
            str(federation.app),
            flower.CONNECTION,
            "--run-config",
            str(file),
            "--format",
            "json",
        ]
        done = _flwr(federation, command, stdout=subprocess.PIPE)
    answer: dict[str, object] = {}
    with contextlib.suppress(json.JSONDecodeError):
        answer = json.loads(done.stdout)
    if not answer.get("success"):
        raise UserError(f"Flower refused the run: {str(answer.get('error-message') or done.stdout).strip()}")
    return int(str(answer["run-id"]))


def follow(federation: Federation, run_id: int) -> flower.Run:
    """Show a run's log on standard error until it ends; return how it ended.

    The SuperLink may be started again meanwhile.
    """
    while True:
        _flwr(federation, ["log", str(run_id), flower.CONNECTION, "--stream"], stdout=sys.stderr)
        with contextlib.suppress(UserError):
            if (run := outcome(federation, run_id)).finished:
                return run
        time.sleep(LOOK_AGAIN)


def outcome(federation: Federation, run_id: int) -> flower.Run:
    """What the SuperLink says of a run.

    Raises:
        UserError: if it doesn't answer, or doesn't know it.
    """
    if not (found := flower.runs(federation, run_id)):
        raise UserError(f"the SuperLink knows no run {run_id}")
    return found[0]


def public_plan(config: RunConfig) -> bytes:
    """The plan that a study's sites will be asked to carry out, as they read, price and approve it.

    Raises:
        UserError: if the public data can't be read.
    """
    from common.datasets import load_public
    from common.plan import plan_of

    proxy = load_public(config).proxy
    classes = len(proxy.preprocessing.classes)
    return plan_of(config, study=config.run_id, proxy_digest=proxy.digest, classes=classes).canonical()


def _require_sites(federation: Federation, config: RunConfig) -> None:
    from common.datasets import sites

    ours = federation.settings.sites
    if strangers := [site.name for site in sites(config) if site.name not in ours]:
        raise UserError(f"the study has the site {strangers[0]}; this federation has {', '.join(ours)}")


def _flwr(
    federation: Federation, arguments: list[str], stdout: int | IO[str]
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [flower.program("flwr"), *arguments],
        env=flower.environment(federation) | {"PYTHONWARNINGS": "ignore"},
        cwd=os.fspath(federation.path),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
