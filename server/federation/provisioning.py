"""Founding a federation: authority, certificates, node keys, the app, and one kit a site.

The folder appears under its name only when all of it is whole. Private keys of sites are in their kits and
nowhere else.
"""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.certificates import expiry
from common.config import RunConfig
from common.errors import UserError
from common.kit import (
    AUTHORITY,
    CERTIFICATE,
    CERTIFICATE_KEY,
    NODE_KEY,
    TO_READ,
    Manifest,
    Proposal,
    pack,
    seal_of,
)
from common.runs import write_new, write_whole
from common.site_files import PROGRAM, own_program, render, require_plain
from server.federation.authority import (
    Credentials,
    certify_courier,
    certify_server,
    found_authority,
    make_node_key,
)
from server.federation.bundle import build, digest_of, find_project, unpack
from server.federation.revocation import LIST
from server.federation.settings import Federation, Settings, bracketed

TEMPLATES = Path(__file__).parent / "templates"
LOCAL_NAMES = ["localhost", "127.0.0.1", "::1"]
"""How programs on the coordinator's machine call the SuperLink."""
USUALLY = "/var/lib/grandrounds"
UNKNOWN = "…"
"""Stands in a kit's policy for what only the site can say."""


@dataclass(frozen=True)
class Made:
    """A kit that was written.

    Attributes:
        site: Whose it is.
        path: Its file.
        seal: Its SHA-256, to be told by another way than the file's own.
    """

    site: str
    path: Path
    seal: str


def found_federation(path: Path, settings: Settings, config: RunConfig | None) -> list[Made]:
    """Write a new federation's folder.

    Args:
        path: Where it goes; nothing may be there.
        settings: What it is; `bundle` is filled in here.
        config: A study that is planned; what it asks of sites stands in their kits as a proposal.

    Raises:
        UserError: if something is there already, or can't be written, or its path isn't plain.
    """
    path = path.absolute()
    require_plain(path)
    if path.exists():
        raise UserError(f"{path} is there already: a federation is founded once")
    bundle = build(find_project())
    settings = settings.model_copy(update={"bundle": digest_of(bundle)})
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(mode=0o700)
        unpack(bundle, aside / "app")
        made = _write(aside, Federation(path, settings), config)
        aside.rename(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [Made(one.site, path / "kits" / one.path.name, one.seal) for one in made]


def proposals(config: RunConfig | None) -> Mapping[str, Proposal]:
    """What a planned study would ask of each of its sites.

    Raises:
        UserError: if the study's data description can't be read.
    """
    if config is None:
        return {}
    from common.datasets import sites

    return {
        site.name: Proposal(
            studies=(config.run_id,) if config.run_id else (),
            unit=config.privacy.unit,
            declared_size=site.declared_size,
            run_epsilon=config.privacy.epsilon,
            delta=config.privacy.delta,
        )
        for site in sites(config)
    }


def _write(aside: Path, federation: Federation, config: RunConfig | None) -> list[Made]:
    settings = federation.settings
    proposed = proposals(config)
    if unknown := sorted(proposed.keys() - set(settings.sites)):
        raise UserError(
            f"--sites: the run config's study has the site {unknown[0]}, and --sites doesn't name it"
        )
    authority = found_authority(settings.name)
    server = certify_server(authority, [settings.host, *LOCAL_NAMES])
    for folder in ("ca", "kits", "nodes", "flower", "gateway", "state", "logs", "runs", "systemd"):
        (aside / folder).mkdir(mode=0o700)
    write_new(aside / "ca" / "ca.key", authority.key)
    write_new(aside / "server.key", server.key)
    write_new(aside / "state" / "superexec.key", secrets.token_bytes(32))
    (aside / LIST).touch()
    (aside / "ca.crt").write_bytes(authority.certificate)
    (aside / "server.crt").write_bytes(server.certificate)
    values = settings.model_dump() | {
        "folder": str(federation.path),
        "program": own_program(),
        "superlink": federation.superlink,
    }
    for name in sorted(file.relative_to(TEMPLATES).as_posix() for file in TEMPLATES.rglob("*.*")):
        place = aside / ("flower/config.toml" if name == "flower.toml" else name)
        place.write_text(render(name, values, TEMPLATES), encoding="utf-8")
    return [
        make_kit(aside, settings, authority, site, proposed.get(site, Proposal())) for site in settings.sites
    ]


def make_kit(folder: Path, settings: Settings, authority: Credentials, site: str, proposal: Proposal) -> Made:
    """Write one site's kit, with keys of its own, and its public key; what was there before is replaced.

    Args:
        folder: The federation's folder.
        settings: What the federation is.
        authority: Who signs the site's certificate.
        site: Whose kit it is.
        proposal: What the coordinator proposes for the site's policy.
    """
    courier, node = certify_courier(authority, site), make_node_key()
    manifest = Manifest(
        federation=settings.name,
        site=site,
        address=f"{bracketed(settings.host)}:{settings.port}",
        bundle=settings.bundle,
        expires=f"{expiry(courier.certificate):%Y-%m-%d}",
        proposal=proposal,
    )
    files = {
        AUTHORITY: authority.certificate,
        CERTIFICATE: courier.certificate,
        CERTIFICATE_KEY: courier.key,
        NODE_KEY: node.private,
    }
    sealed = pack(manifest, files | _to_read(manifest))
    path = folder / "kits" / f"{site}.kit"
    write_whole(path, sealed, 0o600)
    write_whole(folder / "nodes" / f"{site}.pub", node.public)
    write_whole(folder / "nodes" / f"{site}.crt", courier.certificate)  # to tell when it ends
    return Made(site, path, seal_of(sealed))


def _to_read(manifest: Manifest) -> dict[str, bytes]:
    """The files of a site as its own software will write them, for where things usually lie."""
    proposal = manifest.proposal
    values = manifest.model_dump() | {
        "folder": USUALLY,
        "data": "/srv/data",
        "program": ["/opt/grandrounds/bin/python", *PROGRAM],
        "listen": f"unix:{USUALLY}/door/custodian.sock",
        "description": "/srv/data/data.toml",
        "studies": proposal.studies or (UNKNOWN,),
        "unit": proposal.unit or UNKNOWN,
        "declared_size": proposal.declared_size or UNKNOWN,
        "delta": proposal.delta or UNKNOWN,
        "run_epsilon": proposal.run_epsilon or UNKNOWN,
        "lifetime_epsilon": UNKNOWN,
    }
    return {name: render(name, values).encode() for name in TO_READ}


def parse_sites(text: str) -> Sequence[str]:
    """Read `a,b,c`.

    Raises:
        UserError: if there is none, or one twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"--sites {text!r} is refused: expected names with commas between, each once")
    return names
