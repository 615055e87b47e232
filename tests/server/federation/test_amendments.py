"""A founded federation is amended: further kits, another certificate."""

import shutil

import pytest

from common.errors import UserError
from common.kit import SECRET, unpack
from server.federation.amendments import adopt_app, another_kit, renew_certificate
from server.federation.bundle import require_agreed
from server.federation.revocation import revoke
from server.federation.settings import Federation, open_federation

from .conftest import SITES, STUDY


@pytest.fixture
def federation(founded, tmp_path) -> Federation:
    shutil.copytree(founded[0].path, tmp_path / "federation")
    return open_federation(tmp_path / "federation")


def contents(federation: Federation) -> dict[str, bytes]:
    files = [file for file in federation.path.rglob("*") if file.is_file()]
    return {str(file.relative_to(federation.path)): file.read_bytes() for file in files}


def changed(federation: Federation, before: dict[str, bytes]) -> set[str]:
    after = contents(federation)
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_a_site_that_comes_later_gets_a_kit_and_a_place_in_the_settings(federation):
    text = (federation.path / "federation.toml").read_text()
    before = contents(federation)
    made = another_kit(federation, "boston", None)
    assert changed(federation, before) == {
        "federation.toml",
        "kits/boston.kit",
        "nodes/boston.pub",
        "nodes/boston.crt",
    }
    again = open_federation(federation.path)
    assert again.settings.sites == (*SITES, "boston")
    after = (federation.path / "federation.toml").read_text()
    assert [line for line in after.splitlines() if line not in text.splitlines()] == [
        'sites = ["cleveland", "hungary", "switzerland", "long-beach", "boston"]'
    ]
    assert made.path.stat().st_mode & 0o777 == 0o600
    kit = unpack(made.path.read_bytes(), "boston")
    assert kit.seal == made.seal and kit.manifest.bundle == federation.settings.bundle


def test_another_kit_of_a_site_has_other_keys_and_a_proposal(federation):
    path = federation.path / "kits" / "hungary.kit"
    first, before = unpack(path.read_bytes(), "first"), contents(federation)
    another_kit(federation, "hungary", STUDY)
    assert changed(federation, before) == {"kits/hungary.kit", "nodes/hungary.pub", "nodes/hungary.crt"}
    second = unpack(path.read_bytes(), "second")
    assert not {first.files[name] for name in SECRET} & {second.files[name] for name in SECRET}
    assert second.manifest.proposal == first.manifest.proposal


def test_a_revoked_site_gets_no_kit(federation):
    revoke(federation, "hungary")
    with pytest.raises(UserError, match="hungary is revoked, for good"):
        another_kit(federation, "hungary", None)


@pytest.mark.parametrize("what", [lambda one: another_kit(one, "boston", None), renew_certificate])
def test_without_the_authoritys_key_nothing_is_signed_and_nothing_written(federation, what):
    (federation.path / "ca" / "ca.key").unlink()
    before = contents(federation)
    with pytest.raises(UserError, match=r"ca\.key: .*a certificate needs the authority's key; put it back"):
        what(federation)
    assert not changed(federation, before)


def test_a_name_that_is_none_is_refused_before_anything_is_written(federation):
    before = contents(federation)
    with pytest.raises(UserError, match=r"federation\.toml: sites"):
        another_kit(federation, "../boston", None)
    assert not changed(federation, before)


def test_settings_that_a_person_wrote_otherwise_are_not_guessed_at(federation):
    file = federation.path / "federation.toml"
    file.write_text(file.read_text().replace('sites = ["', 'sites = [ # "]" is none of them\n"'))
    before = contents(federation)
    with pytest.raises(UserError, match=r"federation\.toml: sites can't be changed as it is written"):
        another_kit(open_federation(federation.path), "boston", None)
    assert not changed(federation, before)


def test_another_certificate_of_the_coordinators_fits_its_key_and_the_authority(federation):
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    before = contents(federation)
    renew_certificate(federation)
    assert changed(federation, before) == {"server.crt", "server.key"}
    certificate = x509.load_pem_x509_certificate(federation.certificate.read_bytes())
    key = load_pem_private_key(federation.certificate_key.read_bytes(), None)
    assert certificate.public_key() == key.public_key()
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(federation.authority.read_bytes()))
    assert federation.certificate_key.stat().st_mode & 0o777 == 0o600


def test_an_app_is_adopted_whole_and_named_by_its_digest(founded, tmp_path):
    path = tmp_path / "fed"
    shutil.copytree(founded[0].path, path)
    (path / "app" / "client" / "app.py").write_text("# what another version had\n")
    text = (path / "federation.toml").read_text()
    (path / "federation.toml").write_text(text.replace(founded[0].settings.bundle, "0" * 64))
    digest = adopt_app(open_federation(path))
    adopted = open_federation(path)
    assert digest == adopted.settings.bundle == founded[0].settings.bundle
    require_agreed(adopted.app, digest)
    assert (path / "federation.toml").read_text() == text
    assert {file.name for file in path.iterdir()} == {file.name for file in founded[0].path.iterdir()}


def test_an_app_is_not_adopted_where_its_digest_has_no_place(federation):
    file = federation.path / "federation.toml"
    agreed = f'bundle = "{federation.settings.bundle}"'
    file.write_text(file.read_text().replace(agreed, f'"bundle" = "{"0" * 64}"'))
    before = contents(federation)
    with pytest.raises(UserError, match=r"federation\.toml: bundle can't be changed as it is written"):
        adopt_app(open_federation(federation.path))
    assert not changed(federation, before)
