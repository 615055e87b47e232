"""What a founded federation is given later: further kits, another certificate of the coordinator's.

Further certificates need the authority's key, which may lie elsewhere between times (`ca/ca.key`).
"""

import json
import re
import tomllib

from pydantic import ValidationError

from common.config import RunConfig, first_complaint
from common.errors import UserError
from common.kit import Proposal
from common.runs import write_whole
from server.federation.authority import Credentials, certify_server
from server.federation.provisioning import LOCAL_NAMES, Made, make_kit, proposals
from server.federation.settings import SETTINGS, Federation, Settings

SITES = re.compile(r"(?m)^sites\s*=\s*\[[^]]*\]")


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
        text = _with_sites(federation, [*sites, site])
    proposal = proposals(config).get(site, Proposal())
    made = make_kit(federation.path, federation.settings, _authority(federation), site, proposal)
    if text is not None:
        file = federation.path / SETTINGS
        write_whole(file, text.encode(), file.stat().st_mode & 0o777)
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


def _with_sites(federation: Federation, sites: list[str]) -> str:
    """The text of `federation.toml` with other sites, all else and all comments in their places."""
    file = federation.path / SETTINGS
    try:
        before = file.read_text(encoding="utf-8")
        text = SITES.sub(lambda _: f"sites = {json.dumps(sites)}", before, count=1)
        found = Settings.model_validate(tomllib.loads(text), by_alias=True, by_name=False)
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError:
        found = None
    except ValidationError as error:
        raise first_complaint(error, str(file)) from None
    if found != federation.settings.model_copy(update={"sites": tuple(sites)}):
        raise UserError(f"{file}: sites can't be changed as it is written: put it on a line of its own")
    return text
