"""How the programs log: lines for people, or JSON with run, round and site for programs.

One environment variable says which for coordinator, courier and custodian alike, since Flower starts the
first two and passes no flags of ours on. A JSON line has these fields and no others, null where unknown:

    time, level, logger, message, run, round, site, exception

An exception's text may hold whatever the program was handling. Where that may be private, only the program's
own errors are quoted (`UserError`, whose texts are written to be read); of any other its kind and the places
in the code are told.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final, Literal

from pythonjsonlogger.json import JsonFormatter

from common.errors import ConfigError, UserError

Form = Literal["text", "json"]
FORMS: Final[Mapping[str, Form]] = {"": "text", "text": "text", "json": "json"}
VARIABLE: Final = "GRANDROUNDS_LOG_FORMAT"
FIELDS: Final = ("time", "level", "logger", "message", "run", "round", "site", "exception")
"""Of a JSON line."""
LOGGERS: Final = ("", "flwr", "py.warnings")
"""Where lines come out: the root, and those that may have handlers of their own."""

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

_subject: ContextVar[Mapping[str, str | int]] = ContextVar("subject")


@contextmanager
def about(**subject: str | int) -> Iterator[None]:
    """Say what lines are about, while this lasts: `run`, `round`, `site`."""
    token = _subject.set({**_subject.get({}), **subject})
    try:
        yield
    finally:
        _subject.reset(token)


def form_named(name: str, where: str = "environment", key: str = VARIABLE) -> Form:
    """Read the form's name; empty is text.

    Raises:
        ConfigError: if there is no such form.
    """
    try:
        return FORMS[name]
    except KeyError:
        raise ConfigError(where, key, name, "text or json") from None


def follow_environment() -> None:
    """Log JSON in an app that Flower has started, if the environment says so; else Flower's ways stay.

    But Flower logs what ends an app with a traceback, and our own errors are written to be read without one.

    Raises:
        ConfigError: if the environment names no form.
    """
    flower = logging.getLogger("flwr")
    if _plainly not in flower.filters:
        flower.addFilter(_plainly)
    if form_named(os.environ.get(VARIABLE, "")) == "json":
        log_to_stderr("json")


def _plainly(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError):
        record.msg, record.args, record.exc_info = "%s: %s", (record.getMessage(), error), None
    return True


def log_to_stderr(form: Form, *, site: str = "", quote: bool = True) -> None:
    """Let all lines go to standard error in one form.

    Args:
        form: `text` or `json`.
        site: The site that every line is about.
        quote: Whether the text of any exception is shown, not only that of our own.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO)
    handler.addFilter(lambda record: bool(record.getMessage().strip()))  # Flower's own lines have gaps
    handler.setFormatter(_Json(site, quote) if form == "json" else _Text(quote))
    logging.captureWarnings(True)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger().setLevel(logging.INFO)
    # Flower's client tells of every request; one that takes lines to the SuperLink would make the next.
    logging.getLogger("httpx").setLevel(logging.WARNING)


class _Text(logging.Formatter):
    def __init__(self, quote: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._quote = quote

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Names from the network stand in messages: none may begin a line or speak to a terminal."""
        return CONTROL.sub(lambda found: repr(found[0])[1:-1], super().formatMessage(record))

    def formatException(self, ei: ExcInfo) -> str:
        return super().formatException(ei) if self._quote else _unquoted(ei[1])


class _Json(JsonFormatter):
    def __init__(self, site: str, quote: bool) -> None:
        super().__init__(
            ("levelname", "name", "message"),
            rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
            timestamp="time",
            json_ensure_ascii=False,
        )
        self._site, self._quote = site or None, quote

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        known = {**log_data, "site": self._site, **_subject.get({})}
        return {name: known.get(name) for name in FIELDS}

    def formatException(self, ei: ExcInfo) -> str:
        return "".join(super().formatException(ei)) if self._quote else _unquoted(ei[1])


def _unquoted(error: BaseException | None) -> str:
    """Tell an exception, and what it came from, without the texts of any but our own."""
    parts = []
    while error is not None:
        said = f": {error}" if isinstance(error, UserError) else ""
        places = "".join(traceback.format_tb(error.__traceback__))
        parts.append(f"{places}{type(error).__name__}{said}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n  after\n".join(reversed(parts))
