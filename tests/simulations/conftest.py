"""The command line, run in this process."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

import grandrounds


@pytest.fixture(autouse=True)
def levels_as_before() -> Iterator[None]:
    """Commands quieten libraries for good: a process is theirs, but not the tests'."""
    loggers = [logging.getLogger(name) for name in ("flwr", "absl", "matplotlib")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture
def command(monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run a command in this process; return exit code, standard output and standard error."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["grandrounds", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            grandrounds.main()
        shown = capsys.readouterr()
        return end.value.code or 0, shown.out, shown.err

    yield run
    signal.signal(signal.SIGTERM, before)
