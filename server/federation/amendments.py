"""What a founded federation is given later: another app, further kits, another certificate.

Further certificates need the authority's key, which may lie elsewhere between times (`ca/ca.key`).
"""

import contextlib
import json
import re
import shutil
import tomllib

from pydantic import ValidationError

from common.config import RunConfig, first_complaint
from common.errors import UserError
from common.kit import Proposal
from common.runs import write_whole
from server.federation.authority import Credentials, certify_server
from server.federation.bundle import build, digest_of, find_project, unpack
from server.federation.provisioning import LOCAL_NAMES, Made, make_kit, proposals
from server.federation.settings import SETTINGS, Federation, Settings

VALUE = r"""(?m)^{key}\s*=\s*("[^"\n]*"|'[^'\n]*'|\[[^]]*\])"""
"""A key of `federation.toml` with its value."""


def adopt_app(federation: Federation) -> str:
    """Make this software's app the federation's and return its bundle's digest, on which sites must agree.

    Raises:
        UserError: if the project isn't there, or something can't be written.
    """
    bundle = build(find_project())
    digest = digest_of(bundle)
    text = _rewritten(federation, "bundle", digest)
    fresh, old = federation.path / ".app.partial", federation.path / ".app.old"
    try:
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        unpack(bundle, fresh)
        federation.app.rename(old)
        fresh.rename(federation.app)
        _write_settings(federation, text)  # until here a study is refused: app and digest differ
        shutil.rmtree(old)
    except OSError as error:
        raise UserError(f"{error.filename} can't be written: {error.strerror}") from None
    return digest


def another_kit(federation: Federation, site: str, config: RunConfig | None) -> Made:
    """Make a kit for a site that joins later, or another one for a site that has one.

    The keys of a site's earlier kit are good for nothing once the SuperLink has been told (`register_nodes`).

    Args:
        federation: Whose kit it is.
        site: For whom.
        config: A study that is planned; what it asks of the site stands in the kit as a proposal.

    Raises:
        UserError: if the site was revoked, the authority's key isn't there, or a file can't be written.
    """
    if site in federation.revoked():
        raise UserError(f"{site} is revoked, for good: a kit needs another name")
    sites = federation.settings.sites
    text = None if site in sites else _rewritten(federation, "sites", [*sites, site])
    proposal = proposals(config).get(site, Proposal())
    made = make_kit(federation.path, federation.settings, _authority(federation), site, proposal)
    if text is not None:
        _write_settings(federation, text)
    return made


def renew_certificate(federation: Federation) -> None:
    """Make SuperLink and gateway another certificate and key; they show them once they start again.

    Raises:
        UserError: if the authority's key isn't there, or a file can't be written.
    """
    made = certify_server(_authority(federation), [federation.settings.host, *LOCAL_NAMES])
    write_whole(federation.certificate_key, made.key, 0o600)
    write_whole(federation.certificate, made.certificate)


def _authority(federation: Federation) -> Credentials:
    key = federation.path / "ca" / "ca.key"
    try:
        return Credentials(federation.authority.read_bytes(), key.read_bytes())
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}: a certificate needs the authority's key; put it back for "
            "this command, and away again after it"
        ) from None


def _rewritten(federation: Federation, key: str, value: str | list[str]) -> str:
    """The text of `federation.toml` with another value, all else and all comments in their places."""
    file, spelt = federation.path / SETTINGS, json.dumps(value)
    wanted = {key: tuple(value) if isinstance(value, list) else value}
    found: Settings | None = None
    try:
        before = file.read_text(encoding="utf-8")
        text = re.sub(VALUE.format(key=key), lambda _: f"{key} = {spelt}", before, count=1)
        with contextlib.suppress(tomllib.TOMLDecodeError):
            found = Settings.model_validate(tomllib.loads(text), by_alias=True, by_name=False)
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
    except ValidationError as error:
        raise first_complaint(error, str(file)) from None
    if found != federation.settings.model_copy(update=wanted):
        raise UserError(f"{file}: {key} can't be changed as it is written: put it on a line of its own")
    return text


def _write_settings(federation: Federation, text: str) -> None:
    file = federation.path / SETTINGS
    write_whole(file, text.encode(), file.stat().st_mode & 0o777)
