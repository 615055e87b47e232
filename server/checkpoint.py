"""A run that broke off goes on where it stopped: what the server keeps of it, and when.

A run that is `resumable` writes one file, whole or not at all, twice a round: with the round's task *before*
it is sent, and after the round with all that carries over. Whoever starts the same run again, here or on
another machine that was given the folder, goes on from there:

- the task of an open round is sent again as the bytes that it was, since another machine may compute other
  last bits. A site that has answered it gives the same answer again, free of any charge; it would refuse
  another task in the same round;
- no random state is kept, since there is none: all public randomness follows from the seed and the round.

The file is safetensors, with what is no array as JSON in its header.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.config import RunConfig, Scalar
from common.errors import UserError
from common.messages import MessageError, Task
from common.runs import CHECKPOINT, RunFolder, disk_errors, write_whole
from server.methods import State
from server.results import Record

FORMAT: Final = "grandrounds checkpoint 1"
NOT_OF_THE_RUN = ("out", "resumable", "min-sites", "round-timeout")
"""Keys that a resumed run may change: they decide nothing of what is learned or spent."""


@dataclass
class Progress:
    """What carries from one round to the next.

    Attributes:
        state: The central state.
        teacher: The teacher's weights (`Learner.state`).
        held: Rounds that are over.
        task: The open round's task, if it may have been sent.
        heads: Head of each site's ledger, which its next task brings back.
        histograms: Noisy label histograms that were bought, by site.
        record: What was noted.
    """

    state: State
    teacher: bytes
    held: int = 0
    task: Task | None = None
    heads: dict[str, bytes] = field(default_factory=dict)
    histograms: dict[str, tuple[int, ...]] = field(default_factory=dict)
    record: Record = field(default_factory=Record)


def keep(folder: RunFolder, config: RunConfig, progress: Progress) -> None:
    """Write the checkpoint of a run that is resumable.

    Raises:
        UserError: if it can't be written; the one before it stays.
    """
    if not config.resumable:
        return
    arrays = {f"state.{name}": value for name, value in vars(progress.state).items() if value is not None}
    arrays["teacher"] = np.frombuffer(progress.teacher, dtype=np.uint8)
    if progress.task is not None:
        arrays["task"] = np.frombuffer(progress.task.encode(), dtype=np.uint8)
    header = {
        "format": FORMAT,
        "run-config": json.dumps(config.flat()),
        "held": str(progress.held),
        "heads": json.dumps({site: head.hex() for site, head in progress.heads.items()}),
        "histograms": json.dumps(progress.histograms),
        "record": progress.record.model_dump_json(),
    }
    write_whole(folder.path / CHECKPOINT, save(arrays, metadata=header))


def resume(folder: RunFolder, config: RunConfig) -> Progress | None:
    """Read what a broken-off run of the same name left, or None if this one is the first.

    Raises:
        UserError: if the checkpoint is of another run, or damaged.
    """
    path = folder.path / CHECKPOINT
    if not path.exists():
        return None
    header, arrays = _read(path)
    begun, now = json.loads(header["run-config"]), config.flat()
    for key in now:
        if key not in NOT_OF_THE_RUN and begun.get(key) != now[key]:
            raise UserError(
                f"{folder.name} was begun with {key} = {begun.get(key)!r}, not {now[key]!r}: a run goes on "
                "with the settings that its sites know, or gets another run-id"
            )
    parts = {
        name.removeprefix("state."): array for name, array in arrays.items() if name.startswith("state.")
    }
    return Progress(
        state=State(**parts),
        teacher=arrays["teacher"].tobytes(),
        held=int(header["held"]),
        task=Task.decode(arrays["task"].tobytes()) if "task" in arrays else None,
        heads={site: bytes.fromhex(head) for site, head in json.loads(header["heads"]).items()},
        histograms={site: tuple(counts) for site, counts in json.loads(header["histograms"]).items()},
        record=Record.model_validate_json(header["record"]),
    )


def config_in(folder: Path) -> dict[str, Scalar]:
    """The run config, flat, of the broken-off run that left this working folder.

    Raises:
        UserError: if there is no checkpoint in it, or a damaged one.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        raise UserError(f"{path} is not there: the run is finished, was not resumable, or never began")
    found: dict[str, Scalar] = json.loads(_read(path)[0]["run-config"])
    return found


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    damaged = UserError(f"{path} is damaged or of another version; the sites' ledgers are not")
    try:
        with disk_errors(path), safe_open(path, "np") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise damaged
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, MessageError, ValidationError, ValueError, KeyError, TypeError):
        raise damaged from None
