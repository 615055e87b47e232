"""What a run says while it runs."""

import json

import pytest

from common.errors import ConfigError
from common.logs import FIELDS, VARIABLE

pytestmark = pytest.mark.usefixtures("loggers_as_before")


def test_a_runs_json_lines_name_run_and_round(run_app, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "json")
    outcome = run_app()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(tuple(line) == FIELDS for line in lines)
    assert {line["run"] for line in lines} == {outcome.folder.name}
    rounds = [line for line in lines if line["message"].startswith("round ")]
    assert [(line["round"], line["logger"], line["site"]) for line in rounds] == [
        (1, "flwr", None),
        (2, "flwr", None),
    ]
    assert lines[-1]["message"] == f"Results: {outcome.folder}"


def test_a_form_that_there_is_none_of_stops_the_run(run_app, monkeypatch):
    monkeypatch.setenv(VARIABLE, "xml")
    with pytest.raises(ConfigError, match="expected text or json"):
        run_app()
