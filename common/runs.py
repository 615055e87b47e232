"""Where a run's results go: one folder a run, built aside and shown only when it is whole.

A run works in `<out>/.<run-id>.partial` under a lock and renames it to `<out>/<run-id>` at the end, so that
nobody takes half a result for a whole one, and two runs never write to the same place. A run that fails or
is interrupted leaves nothing, unless it is one that resumes.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.config import RunConfig
from common.errors import UserError

LOCK = ".lock"
CHECKPOINT = "checkpoint.safetensors"
"""Where a run that resumes keeps what it needs for that."""
LEAST_FREE = 1 << 20
"""Bytes on a disk that isn't full."""


def final_folder(config: RunConfig, flower_run_id: int) -> Path:
    """The folder of a finished run: `<out>/<run-id>`."""
    return Path(config.out).absolute() / (config.run_id or f"{config.scenario}-{flower_run_id}")


def working_folder(final: Path) -> Path:
    """The folder a run works in until it is whole."""
    return final.with_name(f".{final.name}.partial")


@dataclass
class RunFolder:
    """The folder that a run works in, locked while it runs; `with` leaves either a whole result or none.

    Attributes:
        path: Where the run works.
        final: What the folder is called once it is whole.
        resumes: Whether an interrupted run leaves its work to the next one of the same name.
    """

    path: Path
    final: Path
    _lock: IO[str]
    resumes: bool = False

    @classmethod
    def open(cls, final: Path, resumes: bool = False) -> "RunFolder":
        """Make the working folder beside the final one and lock it.

        Args:
            final: What the folder is to be called.
            resumes: Take up what an interrupted run of this name left, instead of clearing it away.

        Raises:
            UserError: if it can't be written, is taken by another run, or a result of that name is there
                already.
        """
        path = working_folder(final)
        try:
            if final.exists() and (not final.is_dir() or any(final.iterdir())):
                raise UserError(f"{final} is there already: choose another place, or move it away")
            if final.exists() and final.samefile(Path.cwd()):  # it would be replaced under the user's feet
                raise UserError(f"{final.absolute()} is the folder that you are in: name one within it")
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / LOCK).open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not resumes:
                if (path / CHECKPOINT).exists():
                    begun = f"{final} was begun by a run that can go on (resumable = true)"
                    raise UserError(f"{begun}: let it, or remove {path}")
                _clear(path)  # what a run left that was killed
        except BlockingIOError:
            raise UserError(
                f"{final} is being written by another run: wait for it, or choose another place"
            ) from None
        except OSError as error:
            raise UserError(f"{final} can't be written: {error.strerror}") from None
        return cls(path, final, lock, resumes)

    @property
    def name(self) -> str:
        """The run's id."""
        return self.final.name

    def clear(self) -> None:
        """Remove what another run left that this one can't take up."""
        with disk_errors(self.final):
            _clear(self.path)

    def keep_model(self, name: str, body: bytes) -> None:
        """Write a model's file."""
        with disk_errors(self.path / name):
            (self.path / name).write_bytes(body)

    def __enter__(self) -> "RunFolder":
        """Start the run."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Name the folder if the run is whole, else remove what nobody resumes; say if the disk was full."""
        full = isinstance(error, Exception) and shutil.disk_usage(self.path).free < LEAST_FREE
        try:
            if error is None:
                with disk_errors(self.final):
                    (self.path / LOCK).unlink()
                    self.path.replace(self.final)
                    (self.final / CHECKPOINT).unlink(missing_ok=True)
        finally:
            if not self.resumes:
                shutil.rmtree(self.path, ignore_errors=True)  # unless it has got its name
            self._lock.close()
        if full:
            raise UserError(f"{self.final} can't be written: the disk is full") from error


def is_taken(path: Path) -> bool:
    """Whether a run works in this folder."""
    try:
        with (path / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _clear(folder: Path) -> None:
    for stale in folder.iterdir():
        if stale.name != LOCK:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


@contextmanager
def disk_errors(path: Path, what: str = "written") -> Iterator[None]:
    """Say in the user's terms that something can't be written, or read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be {what}: {error.strerror or error}") from None


def write_whole(path: Path, body: bytes, mode: int | None = None) -> None:
    """Write a file whole or not at all: beside its place first, then moved there in one step.

    Args:
        path: The file.
        body: What it is to hold.
        mode: Its permissions; what the umask leaves if there are none.

    Raises:
        UserError: if it can't be written (no such folder, no permission, disk full); what was there stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        try:
            # Not for a moment may anybody else read what is not to be read.
            first = 0o666 if mode is None else mode
            partial.unlink(missing_ok=True)  # in another account's folder it may be a link
            with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, first)) as file:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            make_durable(path.parent)
        finally:
            # Also after Ctrl-C; after the move there is nothing left to remove.
            partial.unlink(missing_ok=True)


def write_new(path: Path, body: bytes) -> None:
    """Write a file that wasn't there, for its owner's eyes only.

    Raises:
        OSError: if it can't be written, or is there.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def make_durable(folder: Path) -> None:
    """Let what was put into a folder, or moved within it, outlast a power cut."""
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
