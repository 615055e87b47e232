"""What `federation status` says where nothing runs: it looks at the folder alone."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.federation.authority import Credentials, certify_courier, certify_server
from server.federation.commands import federation as command
from server.federation.revocation import revoke
from server.federation.settings import open_federation

from .conftest import SITES


@pytest.fixture
def folder(founded, tmp_path) -> Path:
    shutil.copytree(founded[0].path, tmp_path / "federation")
    settings = tmp_path / "federation" / "federation.toml"
    settings.write_text(settings.read_text().replace("superlink-port = 8000", "superlink-port = 9"))
    return tmp_path / "federation"


def asked(folder: Path, *options: str) -> str:
    done = CliRunner().invoke(command, ["status", str(folder), *options])
    assert done.exit_code == 1  # no program runs
    return done.stdout


def test_every_certificate_is_looked_at_and_the_first_to_end_is_named(folder):
    told = json.loads(asked(folder, "--json"))["certificates"]
    assert [one["of"] for one in told] == ["authority", "coordinator", *(f"site {site}" for site in SITES)]
    assert not any(one["soon"] for one in told)
    said = asked(folder)
    assert "the first of 6 certificates, coordinator: until" in said and "WARNING" not in said


def test_those_that_end_soon_are_warned_of_with_what_mends_it(folder):
    authority = Credentials((folder / "ca.crt").read_bytes(), (folder / "ca" / "ca.key").read_bytes())
    (folder / "server.crt").write_bytes(certify_server(authority, ["a"], timedelta(days=12)).certificate)
    for site, days in (("hungary", 3), ("cleveland", 4)):
        made = certify_courier(authority, site, timedelta(days=days))
        (folder / "nodes" / f"{site}.crt").write_bytes(made.certificate)
    revoke(open_federation(folder), "cleveland")
    warnings = [line for line in asked(folder).splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 2  # nobody has to care for a revoked site's
    assert f"grandrounds federation renew {folder}" in warnings[0]
    assert f"grandrounds federation kit {folder} hungary" in warnings[1]

    # Whoever starts a study is told as well, before anything else.
    done = CliRunner().invoke(command, ["run", str(folder), "--run-config", 'scenario="heart" run-id="late"'])
    assert "no SuperLink of this federation answers" in str(done.exception)
    assert [line for line in done.stderr.splitlines() if line.startswith("WARNING")] == warnings
