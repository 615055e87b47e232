"""A run that broke off goes on where it stopped: what the server keeps of it, and when.

A run that is `resumable` writes one file, whole or not at all, twice a round: with the round's task *before*
it is sent, and after the round with all that carries over. Whoever starts the same run again, here or on
another machine that was given the folder, goes on from there:

- the task of an open round is sent again as the bytes that it was, since another machine may compute other
  last bits. A site that has answered it gives the same answer again, free of any charge; it would refuse
  another task in the same round;
- no random state is kept, since there is none: all public randomness follows from the seed and the round;
- what is public must be the same: proxy, validation and test cases, the sites with their declared sizes, and
  the teacher's file are known by their digests, and the files may lie elsewhere.

The file is safetensors, with what is no array as JSON in its header, and a digest over all of it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.config import RunConfig, Scalar
from common.datasets import PublicData, sites
from common.errors import UserError
from common.messages import Task
from common.run_config_files import INPUTS
from common.runs import CHECKPOINT, RunFolder, disk_errors, write_whole
from server.methods import State
from server.results import Record

FORMAT: Final = "grandrounds checkpoint 2"
NOT_OF_THE_RUN = ("out", "resumable", "min-sites", "round-timeout", "metrics-port", "node-owners", *INPUTS)
"""Keys that a resumed run may change: they decide nothing of what is learned or spent, or name files that
are known by their digests."""


@dataclass
class Progress:
    """What carries from one round to the next.

    Attributes:
        public: Digests of what is public, by what it is (`fingerprint`).
        state: The central state.
        teacher: The teacher's weights (`Learner.state`).
        held: Rounds that are over.
        task: The open round's task, if it may have been sent.
        heads: Head of each site's ledger, which its next task brings back.
        histograms: Noisy label histograms that were bought, by site.
        record: What was noted.
    """

    public: Mapping[str, str]
    state: State
    teacher: bytes
    held: int = 0
    task: Task | None = None
    heads: dict[str, bytes] = field(default_factory=dict)
    histograms: dict[str, tuple[int, ...]] = field(default_factory=dict)
    record: Record = field(default_factory=Record)


def fingerprint(config: RunConfig, public: PublicData) -> dict[str, str]:
    """Digests of all that a run takes as public, by what it is.

    Raises:
        UserError: if the teacher's file or the data description can't be read.
    """
    teacher = Path(config.teacher.path)
    with disk_errors(teacher, "read"):
        taught = teacher.read_bytes() if config.teacher.path else b""
    declared = json.dumps([[site.name, site.declared_size] for site in sites(config)]).encode()
    return {
        "proxy cases": public.proxy.digest.hex(),
        "validation cases": _digest(public.validation.x, public.validation.y),
        "test cases": _digest(public.test.x, public.test.y),
        "sites or declared sizes": hashlib.sha256(declared).hexdigest(),
        "bytes in teacher.path": hashlib.sha256(taught).hexdigest(),
    }


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
        "public": json.dumps(progress.public),
        "held": str(progress.held),
        "heads": json.dumps({site: head.hex() for site, head in progress.heads.items()}),
        "histograms": json.dumps(progress.histograms),
        "record": progress.record.model_dump_json(),
    }
    header["seal"] = _seal(header, arrays)
    write_whole(folder.path / CHECKPOINT, save(arrays, metadata=header))


def resume(folder: Path, config: RunConfig, public: Mapping[str, str]) -> Progress | None:
    """Read what a broken-off run of the same name left, or None if this one is the first.

    Args:
        folder: The run's working folder.
        config: The run's.
        public: Digests of what is public (`fingerprint`).

    Raises:
        UserError: if the checkpoint is of another run or of other public cases, or damaged.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    header, arrays = _read(path)
    begun, now = json.loads(header["run-config"]), config.flat()
    for key in now:
        if key not in NOT_OF_THE_RUN and begun.get(key) != now[key]:
            raise UserError(
                f"{config.run_id} was begun with {key} = {begun.get(key)!r}, not {now[key]!r}: a run goes on "
                "with the settings that its sites know, or gets another run-id"
            )
    before = json.loads(header["public"])
    for what, digest in public.items():
        if before.get(what) != digest:
            raise UserError(
                f"{config.run_id} was begun with other {what} than there are here: a run goes on with "
                "the files that it was begun with, or gets another run-id"
            )
    parts = {
        name.removeprefix("state."): array for name, array in arrays.items() if name.startswith("state.")
    }
    return Progress(
        public=public,
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


def _digest(*arrays: NDArray[Any]) -> str:
    hashed = hashlib.sha256()
    for array in arrays:
        # Type and shape too, so that no two lists of arrays read the same.
        hashed.update(f"{array.dtype.str} {array.shape} ".encode())
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()


def _seal(header: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    parts = {name: _digest(array) for name, array in arrays.items()}
    return hashlib.sha256(json.dumps([dict(header), parts], sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    damaged = UserError(f"{path} is damaged or of another version; the sites' ledgers are not")
    try:
        with disk_errors(path, "read"), safe_open(path, "np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            seal = header.pop("seal", "")
            if header.get("format") != FORMAT or seal != _seal(header, arrays):
                raise damaged
            return header, arrays
    except (SafetensorError, ValueError):
        raise damaged from None
