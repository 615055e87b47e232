"""A revoked site stays out, in the folder that every program of the coordinator's starts from."""

import shutil
from pathlib import Path

import pytest

from common.errors import UserError
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


def test_a_site_that_is_none_is_named(federation):
    with pytest.raises(UserError, match="there is no site budapest; this federation has cleveland"):
        revoke(federation, "budapest")
