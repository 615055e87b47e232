"""Running a study: submitted to the SuperLink, followed to its end, and told as it really ended.

`flwr run --stream` exits with 0 for a failed run too; what counts is what the SuperLink says of it.

Every study is `resumable`. One that broke off is submitted again, as another run of Flower's and the same
study, and goes on from its checkpoint (`server.checkpoint`); what may differ is checked here, before anything
starts.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config import RunConfig, Scalar
from common.errors import UserError
from common.run_config_files import INPUTS, as_toml, read_given, read_run_config
from common.runs import CHECKPOINT, is_taken, working_folder
from server.federation import flower
from server.federation.bundle import known_keys, require_agreed
from server.federation.settings import Federation
from server.flower_programs import flwr, flwr_answer

LOOK_AGAIN = 1.0
"""Seconds between two looks at a run that still goes on after its log has ended."""
ENDING_PATIENCE = 30.0
"""Seconds for the server process of a study that broke off to be gone: it outlives its SuperLink a little."""


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
    default = config.out == RunConfig().out
    where = federation.runs if default else Path(config.out)
    return _settled(federation, config.flat(), where)


def broken_off(federation: Federation, study: str, where: Path | None, sources: Sequence[str]) -> RunConfig:
    """The run configuration with which a study that broke off goes on.

    Args:
        federation: Where it goes on; it may be on another machine than the one where it began.
        study: Its `run-id`.
        where: The folder that holds the run's folder; None for the federation's own.
        sources: TOML files or `key=value` pairs for the few keys that may differ, such as where files lie.

    Raises:
        UserError: if no such study broke off here, it is finished or under way, its checkpoint is damaged, or
            it was begun with other settings or other public cases.
    """
    from common.datasets import load_public
    from server.checkpoint import config_in, fingerprint, resume

    where = where or federation.runs
    final, folder = where / study, working_folder(where / study)
    deadline = time.monotonic() + ENDING_PATIENCE
    while is_taken(folder) and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN)
    if final.exists():
        raise UserError(f"study {study} is finished: its results are in {final}")
    if is_taken(folder):
        raise UserError(f"study {study} is under way: wait for its end, or stop it")
    if not (folder / CHECKPOINT).exists():
        left = [found.parent.name for found in sorted(where.glob(f".*/{CHECKPOINT}"))]
        others = ", ".join(name.removeprefix(".").removesuffix(".partial") for name in left)
        here = f"studies that broke off there: {others}" if others else "no study broke off there"
        raise UserError(f"{folder}: nothing to go on with, since no round was begun; {here}")
    config = _settled(federation, config_in(folder) | read_given(sources), where)
    resume(folder, config, fingerprint(config, load_public(config)))
    return config


def goes_on(config: RunConfig) -> bool:
    """Whether a study left a checkpoint."""
    return (working_folder(Path(config.out) / config.run_id) / CHECKPOINT).exists()


def is_whole(results: Path) -> bool:
    """Whether a folder holds the results of all rounds of a study."""
    from common.summary import read

    summary = results / "summary.json"
    return summary.exists() and read(summary).status == "complete"


def require_new(federation: Federation, config: RunConfig) -> None:
    """Refuse to begin a study under a name that has results, or a checkpoint.

    Raises:
        UserError: saying what is there.
    """
    final = Path(config.out) / config.run_id
    if final.exists():
        raise UserError(f"{final} is there already: choose another run-id, or move it away")
    if goes_on(config):
        raise UserError(
            f"study {config.run_id} was begun already: grandrounds federation resume {federation.path} "
            f"{config.run_id} goes on with it, unless it is under way; or choose another run-id"
        )


def submit(federation: Federation, config: RunConfig) -> int:
    """Hand a study to the SuperLink and return Flower's number for the run.

    Raises:
        UserError: if the app isn't the one that sites agreed on, or the SuperLink refuses.
    """
    require_agreed(federation.app, federation.settings.bundle)
    flower.register_nodes(federation)  # the study is told whose each node is
    with tempfile.TemporaryDirectory(prefix="grandrounds-") as folder:
        file = Path(folder) / "run-config.toml"
        file.write_text(as_toml(for_agreed_app(federation, config)), encoding="utf-8")
        answer = flwr_answer(
            _environment(federation),
            *("run", str(federation.app), flower.CONNECTION, "--run-config", str(file)),
            cwd=federation.path,
        )
    return int(str(answer["run-id"]))


def follow(federation: Federation, run_id: int) -> flower.Run:
    """Show a run's log on standard error until it ends; return how it ended.

    The SuperLink may be started again meanwhile.
    """
    while True:
        watch = ("log", str(run_id), flower.CONNECTION, "--stream")
        flwr(_environment(federation), *watch, stdout=sys.stderr, cwd=federation.path)
        with contextlib.suppress(UserError):
            if (run := outcome(federation, run_id)).finished:
                return run
        if not flower.answers(federation):
            print("The SuperLink does not answer; the study is watched again once it does.", file=sys.stderr)
            while not flower.answers(federation):
                time.sleep(LOOK_AGAIN)
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


def _settled(federation: Federation, flat: Mapping[str, Scalar], where: Path) -> RunConfig:
    """The configuration as the server app on this machine takes it.

    It is resumable, its paths start at /, and it names where this federation says whose each node is.
    """
    inputs = {key: str(Path(str(flat[key])).absolute()) for key in INPUTS if flat.get(key)}
    here: dict[str, Scalar] = {
        "out": str(where.absolute()),
        "resumable": True,
        "node-owners": str(federation.node_owners),
    }
    config = RunConfig.from_run_config({**flat, **inputs, **here})
    _require_sites(federation, config)
    return config


def for_agreed_app(federation: Federation, config: RunConfig) -> Mapping[str, Scalar]:
    """A run config without the keys that this software has and the agreed app, of another version, hasn't.

    Raises:
        UserError: if one of them is set.
    """
    flat, defaults, known = config.flat(), RunConfig().flat(), known_keys(federation.app)
    if unknown := [key for key in flat if key not in known and flat[key] != defaults[key]]:
        raise UserError(
            f"{unknown[0]} = {flat[unknown[0]]!r} is refused: the app that the sites agreed on is of another "
            "version and has no such key; leave it out, or agree on another bundle"
        )
    return {key: value for key, value in flat.items() if key in known}


def _require_sites(federation: Federation, config: RunConfig) -> None:
    from common.datasets import sites

    ours = federation.settings.sites  # revoked ones too: a study goes on without them
    if strangers := [site.name for site in sites(config) if site.name not in ours]:
        raise UserError(
            f"the study has the site {strangers[0]}, and this federation has {', '.join(ours)}: give the "
            "study's sites these names in its data description, or found a federation with the study's sites"
        )


def _environment(federation: Federation) -> dict[str, str]:
    return flower.environment(federation) | {"PYTHONWARNINGS": "ignore"}
