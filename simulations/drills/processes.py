"""Programs that are started again when they end, as services are, and the processes below them.

Only processes that were started meanwhile, below this one, are ever ended: it adopts those that lose their
parent.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LOOK = 0.1
"""Seconds between two looks at the programs."""
PATIENCE = 10.0
"""Seconds that programs have to end after SIGTERM."""
_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


@dataclass
class Program:
    """One program.

    Attributes:
        command: What is started.
        log: Where its output goes.
        environment: Its environment.
        rest: Seconds between its end and its next start.
        starts: How often it was started.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    rest: float = 1.0
    starts: int = 0
    _process: "subprocess.Popen[bytes] | None" = None
    _due: float = 0.0

    @property
    def pid(self) -> int | None:
        """Its process, if it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def tend(self) -> None:
        """Start it if it is due."""
        if self.pid is not None:
            return
        if self._process is not None:
            self._process, self._due = None, time.monotonic() + self.rest
        if time.monotonic() >= self._due:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self.starts += 1


@dataclass
class Services:
    """Programs that are looked after, by name; `with` ends all of them."""

    programs: dict[str, Program] = field(default_factory=dict)
    _before: frozenset[int] = frozenset()
    _off: bool = False
    _closed: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __enter__(self) -> "Services":
        """Adopt orphans, and begin to look."""
        _adopt(True)
        self._before = frozenset(_children().get(os.getpid(), []))
        threading.Thread(target=self._tend, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        with self._lock:
            self._closed = True
            running = [pid for program in self.programs.values() if (pid := program.pid) is not None]
        for pid in running:
            _send(pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while any(one.pid for one in self.programs.values()) and time.monotonic() < deadline:
            time.sleep(LOOK)
        kill(self.processes())
        # A process lives on for a moment after SIGKILL; nobody is to find one when the `with` is over.
        while self.processes() and time.monotonic() < deadline + PATIENCE:
            time.sleep(LOOK)
        _adopt(False)

    def run(self, name: str, program: Program) -> None:
        """Start a program and look after it; one of that name that runs already is ended first."""
        if name in self.programs:
            self.retire(name)
        with self._lock:
            self.programs[name] = program
            program.tend()

    def processes(self) -> list[int]:
        """Every process that was started since the `with` began, here or below."""
        children = _children()
        return _below(children, [pid for pid in children.get(os.getpid(), []) if pid not in self._before])

    def retire(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a program for good."""
        with self._lock:
            program = self.programs.pop(name)
        if (pid := program.pid) is not None:
            _send(pid, how)
            deadline = time.monotonic() + PATIENCE
            while program.pid is not None and time.monotonic() < deadline:
                time.sleep(LOOK)
            kill([pid] if program.pid else [])

    @contextlib.contextmanager
    def power_cut(self) -> Iterator[None]:
        """Kill everything at once; nothing starts again before the end of the `with`."""
        with self._lock:
            self._off = True
            kill(self.processes())
        yield
        with self._lock:
            self._off = False

    def _tend(self) -> None:
        while not self._closed:
            with self._lock:
                if not (self._off or self._closed):
                    for program in self.programs.values():
                        program.tend()
            time.sleep(LOOK)


def kill(pids: Sequence[int]) -> None:
    """Send SIGKILL to processes, all of them before the first can react."""
    for pid in pids:
        _send(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes below one, however deep."""
    children = _children()
    return _below(children, children.get(pid, []))


def _below(children: Mapping[int, list[int]], roots: list[int]) -> list[int]:
    found, waiting = [*roots], [*roots]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _children() -> dict[int, list[int]]:
    """Each process's children, those that have ended left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The name in brackets may hold anything; after its last bracket come state and parent.
                after = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if after[0] != "Z":
                    children.setdefault(int(after[1]), []).append(int(entry))
    return children


def words(pid: int) -> str:
    """A process's command line, or "" if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def parent(pid: int) -> int:
    """The process that a process belongs to, or 0."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _adopt(orphans: bool) -> None:
    """Whether processes below this one that lose their parent become its own."""
    ctypes.CDLL(None, use_errno=True).prctl(_CHILD_SUBREAPER, int(orphans), 0, 0, 0)


def _send(pid: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, what)
