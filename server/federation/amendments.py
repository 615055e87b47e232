"""What changes after a federation's founding: a site's kit, the coordinator's certificate, the app.

Further certificates need the authority's key, which may lie elsewhere between times (`ca/ca.key`).
"""

import json
import re
import shutil
import tomllib
from pathlib import Path

from pydantic import ValidationError

from common.config import RunConfig, first_complaint
from common.errors import UserError
from common.kit import Proposal
from common.runs import disk_errors, write_whole
from server.federation.authority import Credentials, certify_server
from server.federation.bundle import build, digest_of, find_project, unpack
from server.federation.provisioning import LOCAL_NAMES, Made, make_kit, proposals
from server.federation.settings import Federation, Settings


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
    text = None
    if site not in sites:
        text = _with_setting(federation, "sites", [*sites, site])
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


def take_installed_app(federation: Federation) -> str:
    """Make the installed software's app the federation's; return the digest on which sites must agree.

    Raises:
        UserError: if the software's own folder isn't there, or a file can't be written.
    """
    bundle = build(find_project())
    digest = digest_of(bundle)
    if digest == federation.settings.bundle:
        return digest
    text = _with_setting(federation, "bundle", digest)
    aside, before = (federation.app.with_name(name) for name in (".app.partial", ".app.before"))
    with disk_errors(federation.app):
        for left in (aside, before):
            shutil.rmtree(left, ignore_errors=True)
        unpack(bundle, aside)
        federation.app.rename(before)
        aside.rename(federation.app)
        _write_settings(federation, text)
        shutil.rmtree(before)
    return digest


def _authority(federation: Federation) -> Credentials:
    key = federation.path / "ca" / "ca.key"
    try:
        return Credentials(federation.authority.read_bytes(), key.read_bytes())
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}: a certificate needs the authority's key; put it back for "
            "this command, and away again after it"
        ) from None


def _with_setting(federation: Federation, key: str, value: object) -> str:
    """The text of `federation.toml` with another value, all comments in their places."""
    file = _settings_file(federation)
    wanted = tuple(value) if isinstance(value, list) else value
    line = re.compile(rf'(?m)^{key}\s*=\s*(\[[^]]*\]|"[^"]*")')
    try:
        before = file.read_text(encoding="utf-8")
        text = line.sub(lambda _: f"{key} = {json.dumps(value)}", before, count=1)
        found = Settings.model_validate(tomllib.loads(text), by_alias=True, by_name=False)
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError:
        found = None
    except ValidationError as error:
        raise first_complaint(error, str(file)) from None
    if found != federation.settings.model_copy(update={key: wanted}):
        raise UserError(f"{file}: {key} can't be changed as it is written: put it on a line of its own")
    return text


def _write_settings(federation: Federation, text: str) -> None:
    file = _settings_file(federation)
    write_whole(file, text.encode(), file.stat().st_mode & 0o777)


def _settings_file(federation: Federation) -> Path:
    return federation.path / "federation.toml"
