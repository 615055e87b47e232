"""A kit becomes a site, or nothing: what is checked, what is written, and for whose eyes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from client.courier_settings import read_courier
from client.founding import Choices
from client.joining import door, join, open_kit, renew
from client.policy import read_policy
from client.served import certificates
from common.certificates import terms
from common.errors import UserError
from common.kit import CERTIFICATE, NODE_KEY, SECRET, Manifest, Proposal, pack, seal_of

ROOT = Path(__file__).resolve().parents[2]
# A site's code never imports the coordinator's; what a coordinator makes is made here by its own program.
MAKE = """
import sys
from server.federation.authority import certify_courier, found_authority, make_node_key
authority = found_authority("trial")
courier = certify_courier(authority, "north")
for content in (authority.certificate, courier.certificate, courier.key, make_node_key().private):
    sys.stdout.write(content.decode() + "\\0")
"""
DATA = """\
target = "ill"
classes = ["no", "yes"]
[[features]]
name = "age"
kind = "numeric"
[sites.north]
declared-size = 90
file = "patients.csv"
"""
MANIFEST = Manifest(
    federation="trial",
    site="north",
    address="fed.example.org:8443",
    bundle="ab" * 32,
    expires="2030-01-01",
    proposal=Proposal(studies=("trial",), unit="record", declared_size=90, run_epsilon=1.0, delta=1e-5),
)


@pytest.fixture(scope="module")
def credentials() -> list[dict[str, bytes]]:
    """Of two federations that know nothing of each other."""
    names = ("ca.crt", "courier.crt", "courier.key", "node.key")
    made = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", MAKE], cwd=ROOT, capture_output=True, text=True, check=True
        )
        made.append(dict(zip(names, map(str.encode, done.stdout.split("\0")), strict=False)))
    return made


@pytest.fixture
def kit(tmp_path, credentials) -> Path:
    path = tmp_path / "north.kit"
    path.write_bytes(pack(MANIFEST, credentials[0]))
    return path


@pytest.fixture
def choices(tmp_path) -> Choices:
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.toml").write_text(DATA)
    (data / "patients.csv").write_text("ill,age\nno,60\nyes,71\n")
    return Choices(
        site="north",
        description=str(data / "data.toml"),
        unit="record",
        declared_size=90,
        delta=1e-5,
        lifetime_epsilon=3.0,
        run_epsilon=1.0,
        studies=("trial",),
        listen=door(tmp_path / "site"),
    )


def test_a_kit_becomes_a_site_whose_halves_fit_together(tmp_path, kit, choices, credentials):
    joined = join(open_kit(kit, seal_of(kit.read_bytes())), tmp_path / "site", choices)
    policy, courier = read_policy(joined.policy), read_courier(joined.settings)
    assert policy.service.listen == courier.settings.custodian == f"unix:{tmp_path}/site/door/custodian.sock"
    assert (policy.site, courier.settings.bundle) == ("north", MANIFEST.bundle)
    assert courier.node_key.read_bytes() == credentials[0][NODE_KEY]
    assert [(one.of, one.soon) for one in terms(certificates(policy))] == [
        ("courier", False),
        ("authority", False),
    ]
    for own in ("courier", "custodian"):
        assert (tmp_path / "site" / own).stat().st_mode & 0o777 == 0o700
    for secret in (*SECRET, "superexec.key"):
        assert (tmp_path / "site" / "courier" / secret).stat().st_mode & 0o777 == 0o600
    unit = (tmp_path / "site" / "systemd" / "grandrounds-custodian.service").read_text()
    serve = f"site serve --policy {tmp_path}/site/custodian/site.toml"
    assert f"ExecStart={sys.executable} -P -m grandrounds {serve}\n" in unit


def test_what_runs_at_the_site_is_its_own_softwares_and_not_the_kits(tmp_path, kit, choices, credentials):
    forged = {"systemd/grandrounds-custodian.service": b"[Service]\nUser=root\nExecStart=/bin/evil\n"}
    forged |= {"compose.yaml": b"services: {custodian: {privileged: true}}\n", "courier.toml": b"evil = 1\n"}
    kit.write_bytes(pack(MANIFEST, credentials[0] | forged))
    join(open_kit(kit, None), tmp_path / "site", choices)
    written = [file.read_bytes() for file in (tmp_path / "site").rglob("*") if file.is_file()]
    assert not any(text in content for text in forged.values() for content in written)


def test_another_seal_than_the_coordinator_told_is_refused_with_both(kit):
    other = "0" * 64
    with pytest.raises(UserError) as refused:
        open_kit(kit, other)
    assert other in str(refused.value) and seal_of(kit.read_bytes()) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("ca.crt", "is not signed by"),
        ("courier.crt", "is not signed by"),
        ("courier.key", "is not the key of"),
    ],
)
def test_credentials_that_do_not_fit_are_refused(kit, credentials, name, complaint):
    kit.write_bytes(pack(MANIFEST, credentials[0] | {name: credentials[1][name]}))
    with pytest.raises(UserError, match=complaint):
        open_kit(kit, None)


@pytest.mark.parametrize("name", ["ca.crt", "courier.crt", "courier.key", "node.key"])
def test_credentials_that_can_not_be_read_are_named(kit, credentials, name):
    kit.write_bytes(pack(MANIFEST, credentials[0] | {name: b"nothing"}))
    with pytest.raises(UserError, match=name):
        open_kit(kit, None)


def test_a_certificate_where_a_node_key_belongs_is_refused(kit, credentials):
    kit.write_bytes(pack(MANIFEST, credentials[0] | {NODE_KEY: credentials[0][CERTIFICATE]}))
    with pytest.raises(UserError, match=NODE_KEY):
        open_kit(kit, None)


def test_a_site_is_founded_once(tmp_path, kit, choices):
    joined = join(open_kit(kit, None), tmp_path / "site", choices)
    key = (joined.policy.parent / "site.key").read_bytes()
    with pytest.raises(UserError, match="founded once"):
        join(open_kit(kit, None), tmp_path / "site", choices)
    assert (joined.policy.parent / "site.key").read_bytes() == key


def test_nothing_is_left_of_a_site_that_can_not_be_made(tmp_path, kit, choices, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.joining._write_to_read", full)
    with pytest.raises(UserError, match="No space left"):
        join(open_kit(kit, None), tmp_path / "site", choices)
    assert not (tmp_path / "site").exists()


def test_a_data_description_that_does_not_know_the_site_founds_none(tmp_path, kit, choices):
    described = Path(choices.description)
    described.write_text(described.read_text().replace("[sites.north]", "[sites.nroth]"))
    with pytest.raises(UserError, match=r"data\.toml: there is no \[sites\.north\]; there are nroth"):
        join(open_kit(kit, None), tmp_path / "site", choices)
    assert not (tmp_path / "site").exists()


def typed(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "grandrounds", "site", *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_proposals_are_taken_by_nobody_who_has_not_read_them(tmp_path, kit, choices):
    """Without a terminal there is nobody to agree: a proposal is no default for scripts."""
    answers = ["--seal", seal_of(kit.read_bytes()), "--data", choices.description]
    answers += ["--lifetime-epsilon", "3"]
    done = typed("join", str(kit), str(tmp_path / "site"), *answers)
    assert done.returncode == 2 and "--unit is missing" in done.stderr
    answers += ["--unit", "record", "--declared-size", "90", "--run-epsilon", "1", "--study", "trial"]
    done = typed("join", str(kit), str(tmp_path / "site"), *answers)
    assert done.returncode == 0, done.stderr
    policy = read_policy(tmp_path / "site" / "custodian" / "site.toml")
    assert policy.data.declared_size == 90 and policy.budget.lifetime_epsilon == 3.0
    checked = typed("check", "--policy", str(tmp_path / "site" / "custodian" / "site.toml"))
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
def test_a_delta_that_the_coordinator_proposes_is_nobodys_default(tmp_path, credentials, choices):
    kit = tmp_path / "north.kit"
    proposal = MANIFEST.proposal.model_copy(update={"delta": 0.05})
    kit.write_bytes(pack(MANIFEST.model_copy(update={"proposal": proposal}), credentials[0]))
    command = ["join", str(kit), str(tmp_path / "site"), "--seal", seal_of(kit.read_bytes())]
    command += ["--data", choices.description, "--unit", "record", "--declared-size", "90"]
    command += ["--lifetime-epsilon", "3", "--run-epsilon", "1", "--study", "trial"]
    for given, said in ([], "--delta is missing"), (["--delta", "0"], "budget.delta = 0.0"):
        refused = typed(*command, *given)
        assert refused.returncode == 2 and said in refused.stderr
        assert not (tmp_path / "site").exists()
    assert typed(*command, "--delta", "1e-6").returncode == 0
    assert read_policy(tmp_path / "site" / "custodian" / "site.toml").budget.delta == 1e-6


def test_a_kit_whose_seal_nobody_compared_is_not_joined(tmp_path, kit):
    done = typed("join", str(kit), str(tmp_path / "site"))
    assert done.returncode == 2 and "--seal is missing" in done.stderr
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace("fed.example.org:8443", "fed.example.org"), "address"),
        (lambda text: text.replace("abab", "xyxy"), "bundle"),
        (lambda text: text + "insecure = true\n", "insecure"),
    ],
)
def test_the_couriers_settings_are_read_to_the_letter(tmp_path, kit, choices, change, complaint):
    joined = join(open_kit(kit, None), tmp_path / "site", choices)
    joined.settings.write_text(change(joined.settings.read_text()))
    with pytest.raises(UserError, match=complaint):
        read_courier(joined.settings)


def test_keys_that_others_can_read_start_no_courier(tmp_path, kit, choices):
    joined = join(open_kit(kit, None), tmp_path / "site", choices)
    (joined.settings.parent / NODE_KEY).chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read_courier(joined.settings)


def test_a_courier_of_another_bundle_finds_nothing_that_one_left(tmp_path, kit, choices):
    courier = read_courier(join(open_kit(kit, None), tmp_path / "site", choices).settings)
    other = replace(courier, settings=courier.settings.model_copy(update={"bundle": "cd" * 32}))
    assert courier.flower_home != other.flower_home


def test_another_kit_replaces_the_couriers_keys_and_nothing_of_the_custodians(
    kit, choices, credentials, tmp_path
):
    joined = join(open_kit(kit, None), tmp_path / "site", choices)
    kept = {file: file.read_bytes() for file in joined.folder.rglob("*") if file.is_file()}
    other = MANIFEST.model_copy(update={"bundle": "cd" * 32, "address": "elsewhere.example.org:8443"})
    kit.write_bytes(pack(other, credentials[1]))
    assert renew(open_kit(kit, None), joined.folder) == joined.settings
    replaced = {file.name for file in kept if file.read_bytes() != kept[file]}
    assert replaced == {"ca.crt", "courier.crt", "courier.key", "node.key", "courier.toml"}
    held = joined.folder / "custodian"
    theirs = {str(file.relative_to(held)) for file in kept if held in file.parents}
    same = {name for name in theirs if (held / name).read_bytes() == kept[held / name]}
    assert theirs - same == {"state/ca.crt", "state/courier.crt"}
    assert (held / "state" / "courier.crt").read_bytes() == credentials[1]["courier.crt"]
    assert {file for file in joined.folder.rglob("*") if file.is_file()} == kept.keys()
    courier = read_courier(joined.settings)
    assert courier.node_key.read_bytes() == credentials[1][NODE_KEY]
    assert (courier.settings.bundle, courier.settings.address) == (other.bundle, other.address)
    assert courier.settings.custodian == choices.listen


def test_a_kit_of_another_site_renews_nothing(kit, choices, credentials, tmp_path):
    joined = join(open_kit(kit, None), tmp_path / "site", choices)
    kit.write_bytes(pack(MANIFEST.model_copy(update={"site": "south"}), credentials[1]))
    with pytest.raises(UserError, match=r"the kit is for site south, and .* is site north"):
        renew(open_kit(kit, None), joined.folder)
    assert read_courier(joined.settings).node_key.read_bytes() == credentials[0][NODE_KEY]
    with pytest.raises(UserError, match="no site to renew here"):
        renew(open_kit(kit, None), tmp_path)
