"""A founded federation: what lies where, who can read it, and that sites share no secret."""

import shutil
import subprocess
import tomllib
from itertools import combinations
from pathlib import Path

import pytest

from common.certificates import expiry
from common.config import RunConfig
from common.errors import UserError
from common.kit import AUTHORITY, NEEDED, SECRET, TO_READ, Kit, Proposal, unpack
from server.federation.bundle import require_agreed
from server.federation.provisioning import found_federation, parse_sites
from server.federation.settings import open_federation

from .conftest import SITES, STUDY, settings


@pytest.fixture(scope="module")
def kits(founded) -> dict[str, Kit]:
    return {made.site: unpack(made.path.read_bytes(), made.site) for made in founded[1]}


def test_every_site_has_a_kit_that_says_what_it_needs(founded, kits):
    federation, made = founded
    assert tuple(kits) == SITES
    for one in made:
        kit = kits[one.site]
        assert kit.seal == one.seal and kit.files.keys() == {*NEEDED, *TO_READ}
        assert kit.manifest.site == one.site and kit.manifest.address == "127.0.0.1:8443"
        assert kit.manifest.bundle == federation.settings.bundle
        assert kit.manifest.expires == f"{expiry(kit.files['courier.crt']):%Y-%m-%d}"
    proposal = Proposal(studies=("trial",), unit="record", declared_size=150, run_epsilon=1.0, delta=1e-5)
    assert kits["hungary"].manifest.proposal == proposal


def test_kits_share_no_secret_with_each_other_or_the_coordinators_folder(founded, kits):
    federation, _ = founded
    secrets = {(site, name): kit.files[name] for site, kit in kits.items() for name in SECRET}
    assert len(set(secrets.values())) == len(SECRET) * len(SITES)
    for one, other in combinations(kits.values(), 2):
        shared = {name for name in one.files if one.files[name] == other.files[name]}
        assert shared & {*NEEDED} == {AUTHORITY}
        everything = b"".join(other.files.values())
        assert not any(one.files[name] in everything for name in SECRET)
    files = [file for file in federation.path.rglob("*") if file.is_file() and file.suffix != ".kit"]
    kept = [file.read_bytes() for file in files]
    assert not any(secret in content for secret in secrets.values() for content in kept)
    coordinators = [(federation.path / name).read_bytes() for name in ("ca/ca.key", "server.key")]
    assert not any(secret in b"".join(kit.files.values()) for kit in kits.values() for secret in coordinators)


def test_only_the_owner_gets_into_the_folder_and_at_secrets(founded):
    federation, _ = founded
    assert federation.path.stat().st_mode & 0o777 == 0o700
    secret = [*federation.path.glob("kits/*"), *federation.path.rglob("*.key")]
    assert len(secret) == len(SITES) + 3
    assert {file.stat().st_mode & 0o777 for file in secret} == {0o600}


def test_the_app_is_the_agreed_one(founded):
    require_agreed(founded[0].app, founded[0].settings.bundle)


def test_a_federation_is_founded_once(founded):
    federation, made = founded
    before = made[0].path.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        found_federation(federation.path, settings(), None)
    assert made[0].path.read_bytes() == before


def test_nothing_is_left_of_one_that_can_not_be_founded(tmp_path):
    study = RunConfig.from_run_config({"scenario": "thyroid"})
    with pytest.raises(UserError, match="--sites doesn't name"):
        found_federation(tmp_path / "fed", settings(), study)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", " , ", "a,b,a"])
def test_sites_are_named_each_once(text):
    with pytest.raises(UserError, match="--sites"):
        parse_sites(text)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "port is missing"),
        ('port = "8443"', "port = '8443' is refused"),
        ("port = 0", "port = 0 is refused"),
        ("port = 8443\nextra = 1", "extra = 1 is refused"),
    ],
)
def test_settings_are_read_to_the_letter(founded, tmp_path, line, complaint):
    text = (founded[0].path / "federation.toml").read_text()
    (tmp_path / "federation.toml").write_text(text.replace("port = 8443", line, 1))
    with pytest.raises(UserError) as refused:
        open_federation(tmp_path)
    assert complaint in str(refused.value)


def test_where_no_federation_is_the_way_to_one_is_named(tmp_path):
    with pytest.raises(UserError, match="grandrounds federation init"):
        open_federation(tmp_path)


def test_files_to_read_are_well_formed(kits, founded):
    policy = kits["hungary"].files["site.toml"].decode().replace("…", "9")
    assert tomllib.loads(policy)["allow"]["studies"] == [STUDY.run_id]
    courier = tomllib.loads(kits["hungary"].files["courier.toml"].decode())
    assert courier["bundle"] == founded[0].settings.bundle
    flower = tomllib.loads((founded[0].flower_home / "config.toml").read_text())
    assert flower["superlink"]["federation"]["root-certificates"] == str(founded[0].authority)


def directives(unit: str) -> dict[str, list[str]]:
    """A unit's lines by what they set; what stands twice is a list of two."""
    found: dict[str, list[str]] = {}
    for line in unit.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def units(kits, founded) -> dict[str, str]:
    """Every unit's text, by the program that it starts."""
    federation, site = founded[0], kits["hungary"].files
    texts = {name: site[f"systemd/grandrounds-{name}.service"].decode() for name in ("custodian", "courier")}
    for name in ("superlink", "superexec", "gateway"):
        texts[name] = (federation.path / "systemd" / f"grandrounds-{name}.service").read_text()
    return texts


def test_units_take_every_privilege_that_is_not_needed(units):
    for name, text in units.items():
        unit = directives(text)
        assert unit["User"] != ["root"] and unit["UMask"] == ["0077"], name
        for wanted in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectKernelTunables"):
            assert unit[wanted] == ["yes"], name
        assert unit["ProtectSystem"] == ["strict"] and unit["CapabilityBoundingSet"] == [""], name
        assert unit["SystemCallFilter"] == ["@system-service", "~@privileged @resources"], name
        assert unit["Restart"] == ["always"] and int(unit["TimeoutStopSec"][0]) <= 30, name


def test_custodian_and_courier_share_nothing_but_the_door(units):
    custodian, courier = directives(units["custodian"]), directives(units["courier"])
    assert custodian["User"] != courier["User"] and custodian["Group"] == courier["SupplementaryGroups"]
    assert custodian["PrivateNetwork"] == ["yes"] and custodian["RestrictAddressFamilies"] == ["AF_UNIX"]
    here = "/var/lib/grandrounds"
    assert custodian["ReadWritePaths"] == [f"{here}/custodian {here}/door"]
    assert courier["ReadWritePaths"] == [f"{here}/courier"]
    assert custodian["InaccessiblePaths"] == [f"-{here}/courier"]
    assert courier["InaccessiblePaths"] == [f"-{here}/custodian"]


def test_no_unit_of_the_coordinators_sees_the_authoritys_key_or_the_kits(units, founded):
    path = founded[0].path
    for name in ("superlink", "superexec", "gateway"):
        hidden = directives(units[name])["InaccessiblePaths"][0].split()
        assert {f"{path}/ca", f"{path}/kits"} <= set(hidden), name
    assert f"{path}/state" in directives(units["gateway"])["InaccessiblePaths"][0].split()


@pytest.mark.parametrize("folder", ["/srv/a b", "/srv/100%", "/srv/a:b", "/srv/$HOME"])
def test_a_path_that_units_would_read_differently_is_refused(folder):
    with pytest.raises(UserError, match="choose a folder"):
        found_federation(Path(folder), settings(), None)


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"),
    reason="systemd-analyze IS NOT INSTALLED: units are held by their text alone",
)
@pytest.mark.parametrize(
    ("unit", "exposure"),
    [("custodian", 20), ("courier", 30), ("superlink", 30), ("superexec", 30), ("gateway", 30)],
)
def test_systemd_finds_units_valid_and_hardened(units, tmp_path, unit, exposure):
    name = f"grandrounds-{unit}.service"
    for other, text in units.items():
        for absent in ("/opt/grandrounds/bin/python", "/usr/sbin/nginx"):
            text = text.replace(absent, "/usr/bin/true")
        (tmp_path / f"grandrounds-{other}.service").write_text(text)
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / name)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and name not in done.stderr, done.stderr
    rate = ["systemd-analyze", "security", "--offline=true", f"--threshold={exposure}", str(tmp_path / name)]
    done = subprocess.run(rate, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-400:]
