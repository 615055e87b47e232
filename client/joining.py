"""Joining a federation: a kit becomes a site's folder.

    custodian/     policy, key, ledger (`client.founding`): the custodian's account's alone; in `state/`,
                   copies of the courier's certificates, since the other folder is closed to it
    door/          the socket between the two
    courier/       settings, certificates, keys: the courier's account's alone
    systemd/, compose.yaml, README.md

Keys, certificates, the coordinator's address and the bundle's digest come from the kit, and are checked.
What the custodian may do comes from the person who joins, and what runs at the site from the site's own
software.

Another kit of the same site replaces what its first one brought, and nothing else: no policy, no ledger.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.courier_settings import EXECUTOR_KEY, CourierSettings
from client.founding import Choices, found
from client.policy import ServedPolicy
from common.errors import UserError
from common.kit import AUTHORITY, CERTIFICATE, CERTIFICATE_KEY, NEEDED, NODE_KEY, PUBLIC, TO_READ, Kit, unpack
from common.runs import disk_errors, write_new, write_whole
from common.settings_files import read_settings
from common.site_files import own_program, render, require_plain


@dataclass(frozen=True)
class Joined:
    """A site's folder.

    Attributes:
        folder: Where it is.
        policy: The custodian's policy, to be read.
        settings: The courier's settings.
    """

    folder: Path
    policy: Path
    settings: Path


def open_kit(path: Path, seal: str | None) -> Kit:
    """Read a kit and check all that can be checked without the coordinator.

    Args:
        path: The kit.
        seal: Its SHA-256 as the coordinator told it, to be compared; None leaves that to whoever is shown it.

    Raises:
        UserError: if it isn't whole, has another seal, or its keys and certificates don't fit together.
    """
    try:
        kit = unpack(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    if seal is not None and seal.strip().lower() != kit.seal:
        raise UserError(
            f"{path}: its seal is {kit.seal}, and not {seal}: it isn't the kit that the coordinator made"
        )
    _check_credentials(kit.files, str(path))
    return kit


def join(kit: Kit, folder: Path, choices: Choices) -> Joined:
    """Make a site's folder; nothing is left of it if it can't be made whole.

    Args:
        kit: What the coordinator handed over.
        folder: Where the site goes; an empty folder may be there.
        choices: What the custodian may do; its site and socket must be the kit's and the folder's.

    Raises:
        UserError: if something is there already, or can't be written, or its path isn't plain.
    """
    folder = folder.absolute()
    require_plain(folder)
    existed = folder.exists()
    if existed and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: a site is founded once")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        (folder / "custodian").mkdir(mode=0o700)  # not even names and times of its files are the courier's
        policy = found(folder / "custodian", choices)
        (folder / "door").mkdir(mode=0o750)  # the courier's account reaches it through its group
        for name in PUBLIC:
            write_new(folder / "custodian" / "state" / name, kit.files[name])
        settings = _write_courier(kit, folder, choices.listen)
        _write_to_read(kit, folder, choices)
    except BaseException as error:
        for made in ("custodian", "door", "courier", "systemd"):
            shutil.rmtree(folder / made, ignore_errors=True)
        for made in ("compose.yaml", "README.md"):
            (folder / made).unlink(missing_ok=True)
        if not existed and folder.is_dir():
            folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{folder} can't be written: {error.strerror}") from None
        raise
    return Joined(folder, policy, settings)


def renew(kit: Kit, folder: Path) -> Path:
    """Put another kit's keys, certificates and settings in the place of those that a site has.

    Of the custodian's only the copies of the certificates are touched.

    Args:
        kit: What the coordinator handed over.
        folder: The site's.

    Returns:
        The courier's settings.

    Raises:
        UserError: if there is no site in the folder, the kit is another site's, or a file can't be written.
    """
    courier = folder.absolute() / "courier"
    settings, policy = courier / "courier.toml", folder.absolute() / "custodian" / "site.toml"
    try:
        now, state = read_settings(CourierSettings, settings), state_folder(policy)
    except OSError as error:
        raise UserError(f"{error.filename}: no site to renew here: {error.strerror}") from None
    if kit.manifest.site != now.site:
        raise UserError(f"the kit is for site {kit.manifest.site}, and {folder} is site {now.site}")
    text = render("courier.toml", kit.manifest.model_dump() | {"listen": now.custodian})
    written = {name: kit.files[name] for name in NEEDED} | {settings.name: text.encode()}
    files = {courier / name: content for name, content in written.items()}
    for path, content in (files | {state / name: kit.files[name] for name in PUBLIC}).items():
        write_whole(path, content, 0o600)
        with disk_errors(path):
            owner = path.parent.stat()
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)  # also where root renews it
    return settings


def state_folder(policy: Path) -> Path:
    """Where a custodian's state lies; read by whoever joins, so a file of another account's is taken.

    Raises:
        OSError: if the policy can't be read.
        UserError: if it isn't right.
    """
    return Path(read_settings(ServedPolicy, policy).beside(policy.parent).state)


def door(folder: Path) -> str:
    """Where a site's custodian listens."""
    return f"unix:{folder.absolute() / 'door' / 'custodian.sock'}"


def _write_courier(kit: Kit, folder: Path, listen: str) -> Path:
    courier = folder / "courier"
    courier.mkdir(mode=0o700)
    for name in NEEDED:
        write_new(courier / name, kit.files[name])
    write_new(courier / EXECUTOR_KEY, secrets.token_bytes(32))
    settings = courier / "courier.toml"
    write_new(settings, render("courier.toml", kit.manifest.model_dump() | {"listen": listen}).encode())
    return settings


def _write_to_read(kit: Kit, folder: Path, choices: Choices) -> None:
    values = kit.manifest.model_dump() | {
        "folder": str(folder),
        "data": str(Path(choices.description).parent),
        "program": own_program(),
    }
    (folder / "systemd").mkdir()
    for name in TO_READ:
        if name not in ("site.toml", "courier.toml"):  # those lie where they are used
            (folder / name).write_text(render(name, values), encoding="utf-8")


def _check_credentials(files: Mapping[str, bytes], where: str) -> None:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    def read(name: str, load: Callable[[bytes], object]) -> object:
        try:
            return load(files[name])
        except ValueError:
            raise UserError(f"{where}: {name} can't be read: ask the coordinator for the kit again") from None

    authority = read(AUTHORITY, x509.load_pem_x509_certificate)
    certificate = read(CERTIFICATE, x509.load_pem_x509_certificate)
    key = read(CERTIFICATE_KEY, lambda pem: load_pem_private_key(pem, None))
    node = read(NODE_KEY, lambda pem: load_ssh_private_key(pem, None))
    assert isinstance(authority, x509.Certificate) and isinstance(certificate, x509.Certificate)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(node, ec.EllipticCurvePrivateKey):
        raise UserError(
            f"{where}: a key is of another kind than expected: ask the coordinator for the kit again"
        )
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise UserError(f"{where}: {CERTIFICATE} is not signed by {AUTHORITY}") from None
    if certificate.public_key() != key.public_key():
        raise UserError(f"{where}: {CERTIFICATE_KEY} is not the key of {CERTIFICATE}")
    if certificate.not_valid_after_utc < datetime.now(UTC):
        day = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
        raise UserError(f"{where}: {CERTIFICATE} ran out on {day}: ask the coordinator for another kit")
