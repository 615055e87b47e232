"""Revoking a site: neither gateway nor SuperLink lets it in again.

What is revoked stands in two places, so that it outlasts every restart: the name of the file with the site's
public key (`nodes/SITE.revoked`), of which no SuperLink is told any more, and `gateway/revoked.conf`, by
which nginx refuses the certificate of that name. A study that is under way goes on without the site, if
`min-sites` allows.
"""

from common.errors import UserError
from common.runs import write_whole
from server.federation import flower
from server.federation.settings import REVOKED, Federation

LIST = "gateway/revoked.conf"


def revoke(federation: Federation, site: str) -> bool:
    """Revoke a site for good; return whether the SuperLink was there to be told.

    Raises:
        UserError: if there is no such site, or a file can't be written.
    """
    if site not in federation.settings.sites:
        raise UserError(
            f"there is no site {site}; this federation has {', '.join(federation.settings.sites)}"
        )
    key = federation.node_keys()[site]
    try:
        key.replace(key.with_name(f"{site}.{REVOKED}"))
    except OSError as error:
        raise UserError(f"{key}: can't be renamed: {error.strerror}") from None
    write_whole(federation.path / LIST, as_list(federation.revoked()).encode())
    if told := flower.answers(federation):
        flower.register_nodes(federation)
    return told


def as_list(revoked: list[str]) -> str:
    """Revoked sites as nginx looks for them in a certificate's subject."""
    return "".join(f'"CN={site}" 1;\n' for site in revoked)
