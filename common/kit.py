"""A site's kit: the one file that a coordinator hands to a hospital.

A gzipped tar archive with what only this site may hold (a key that Flower knows it by, a certificate for
the way in), whom to trust on the other end, and which bundle its courier is. Files to read stand beside:
what the coordinator proposes for the policy, and the units that the site's own software will write. Nothing
in a kit is ever executed.

The **seal** is the SHA-256 of the whole file. The coordinator tells it by another way than the kit's own, and
`grandrounds site join` shows it: a kit that was swapped on the way has another seal.

A kit comes from outside, so reading one takes nothing on trust: names, sizes and kinds of members are checked
before a byte is kept.
"""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from common.accounting import Unit
from common.config import first_complaint
from common.errors import UserError
from common.strict import Strict

MANIFEST = "kit.json"
AUTHORITY, CERTIFICATE, CERTIFICATE_KEY, NODE_KEY = "ca.crt", "courier.crt", "courier.key", "node.key"
NEEDED = (AUTHORITY, CERTIFICATE, CERTIFICATE_KEY, NODE_KEY)
PUBLIC = (AUTHORITY, CERTIFICATE)
"""What anybody may read."""
SECRET = (CERTIFICATE_KEY, NODE_KEY)
"""What nobody but the site may read."""
TO_READ = (
    "README.md",
    "site.toml",
    "courier.toml",
    "compose.yaml",
    "systemd/grandrounds-custodian.service",
    "systemd/grandrounds-courier.service",
    "systemd/grandrounds-sysusers.conf",
)
LARGEST = 1 << 20
"""Bytes of a kit, and of all that it holds."""

SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Address = Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Proposal(Strict):
    """What the coordinator proposes for the site's policy. The site decides."""

    studies: Annotated[tuple[str, ...], Field(strict=False)] = ()
    unit: Unit | None = None
    declared_size: int | None = None
    run_epsilon: float | None = None
    delta: float | None = None


class Manifest(Strict):
    """What a kit says about itself."""

    format: Literal[1] = 1
    federation: SiteName
    site: SiteName
    address: Address
    """Where the site's SuperNode knocks: host and port of the coordinator's gateway."""
    bundle: Digest
    """SHA-256 of the app bundle whose courier may start here."""
    expires: str
    """Day on which the courier's certificate runs out."""
    proposal: Proposal


@dataclass(frozen=True)
class Kit:
    """A kit, opened.

    Attributes:
        manifest: What it says about itself.
        files: Bytes of the files, by their names within.
        seal: SHA-256 of the kit's own bytes, in hexadecimal.
    """

    manifest: Manifest
    files: Mapping[str, bytes]
    seal: str


def pack(manifest: Manifest, files: Mapping[str, bytes]) -> bytes:
    """Make a kit's bytes; secrets get mode 600, the rest 644."""
    shown = (manifest.model_dump_json(by_alias=True, indent=2) + "\n").encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in {MANIFEST: shown, **files}.items():
            member = tarfile.TarInfo(f"{manifest.site}/{name}")
            member.size, member.mode = len(content), 0o600 if name in SECRET else 0o644
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


def unpack(sealed: bytes, where: str) -> Kit:
    """Open a kit.

    Args:
        sealed: The kit's bytes.
        where: What to call it in messages.

    Raises:
        UserError: if it isn't a whole kit of this format.
    """
    files: dict[str, bytes] = {}
    try:
        plain = _inflated(sealed)
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                content = archive.extractfile(member) if member.isfile() else None
                if content is None or name in files or name not in (MANIFEST, *NEEDED, *TO_READ):
                    raise UserError(f"{where}: {member.name!r} has no place in a kit")
                files[name] = content.read()
    except (OSError, EOFError, tarfile.TarError, ValueError):
        raise UserError(f"{where}: not a kit, or not a whole one: ask the coordinator for it again") from None
    if missing := [name for name in (MANIFEST, *NEEDED) if name not in files]:
        raise UserError(f"{where}: {missing[0]} is missing: ask the coordinator for the kit again")
    try:
        manifest = Manifest.model_validate_json(files.pop(MANIFEST), by_alias=True, by_name=False)
    except ValidationError as error:
        raise first_complaint(error, f"{where}: {MANIFEST}") from None
    return Kit(manifest, files, seal_of(sealed))


def seal_of(sealed: bytes) -> str:
    """SHA-256 of a kit's bytes, in hexadecimal."""
    return hashlib.sha256(sealed).hexdigest()


def _inflated(sealed: bytes) -> bytes:
    if len(sealed) > LARGEST:
        raise ValueError("too large")
    with gzip.open(io.BytesIO(sealed)) as file:
        plain = file.read(LARGEST + 1)
    if len(plain) > LARGEST:
        raise ValueError("too large")
    return plain
