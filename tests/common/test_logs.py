"""One line, one object: who, which run, which round, and nothing that was not asked to be said."""

import json
import logging

import pytest

from common.errors import ConfigError, UserError
from common.logs import FIELDS, VARIABLE, about, follow_environment, form_named, log_to_stderr

log = logging.getLogger("grandrounds.test")
pytestmark = pytest.mark.usefixtures("loggers_as_before")


def private() -> str:
    """A value that no source line shows."""
    return "PRI" + "VATE"


def test_a_json_line_has_just_these_fields(capsys):
    log_to_stderr("json", site="north")
    with about(run="trial", round=3):
        log.info("%d answers, ε = %s", 2, "1.0", extra={"secret": "PRIVATE"})
        with about(site="south"):
            log.info("within\nit")
    log.info("after")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(tuple(line) == FIELDS for line in lines)
    subjects = [(line["run"], line["round"], line["site"]) for line in lines]
    assert subjects == [("trial", 3, "north"), ("trial", 3, "south"), (None, None, "north")]
    assert [line["message"] for line in lines] == ["2 answers, ε = 1.0", "within\nit", "after"]
    assert {line["level"] for line in lines} == {"INFO"}


@pytest.mark.parametrize("form", ["json", "text"])
def test_where_nothing_private_may_show_only_our_own_errors_are_quoted(capsys, form):
    log_to_stderr(form, quote=False)
    try:
        try:
            float(private())
        except ValueError:
            raise KeyError(private())  # noqa: B904
    except KeyError:
        log.exception("first")
    try:
        raise RuntimeError(private()) from UserError("no column 'age'")
    except RuntimeError:
        log.exception("second")
    shown = capsys.readouterr().err
    assert private() not in shown
    for told in ("ValueError", "KeyError", "RuntimeError", "UserError: no column 'age'", "test_logs.py"):
        assert told in shown


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_name_from_the_network_neither_begins_a_line_nor_speaks_to_a_terminal(capsys, form):
    log_to_stderr(form)
    log.warning("no column %s, ε", "a\n2026-01-01 INFO all is well\x1b[2J\x9b1m")
    (line,) = capsys.readouterr().err.splitlines()
    assert "a\\n2026-01-01 INFO all is well\\x1b[2J" in line.replace("u00", "x") and "ε" in line


@pytest.mark.parametrize("form", ["json", "text"])
def test_elsewhere_an_exception_is_told_in_full(capsys, form):
    log_to_stderr(form)
    try:
        int("x1")
    except ValueError:
        log.exception("failed")
    assert "invalid literal" in capsys.readouterr().err


def test_the_form_is_text_unless_it_is_named_and_no_other_is_taken():
    assert [form_named(name) for name in ("", "text", "json")] == ["text", "text", "json"]
    with pytest.raises(ConfigError, match=rf"environment: {VARIABLE} = 'xml' is refused: .* text or json"):
        form_named("xml")


def test_an_app_follows_the_environment(monkeypatch, capsys):
    before = logging.getLogger("flwr").handlers
    monkeypatch.delenv(VARIABLE, raising=False)
    follow_environment()
    assert logging.getLogger("flwr").handlers is before
    monkeypatch.setenv(VARIABLE, "json")
    follow_environment()
    logging.getLogger("flwr").info("as Flower says")
    logging.getLogger("other").info("as others say")
    logging.getLogger("httpx").info("a request was sent")
    logging.getLogger("flwr").debug("in detail")
    logging.getLogger("flwr").info("")
    follow_environment()
    logging.getLogger("flwr").info("once")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["as Flower says", "as others say", "once"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_flower_says_of_our_own_errors_has_no_traceback(capsys, monkeypatch, form):
    monkeypatch.setenv(VARIABLE, form)
    log_to_stderr(form)
    follow_environment()
    follow_environment()
    flower = logging.getLogger("flwr")
    for error in (UserError("roll call: 0 sites took part"), RuntimeError("a bug")):
        try:
            raise error
        except Exception as caught:
            flower.error("%s raised an exception", "ServerApp", exc_info=caught)
    shown = capsys.readouterr().err
    assert shown.count("ServerApp raised an exception: roll call: 0 sites took part") == 1
    assert shown.count("Traceback") == 1 and "a bug" in shown
