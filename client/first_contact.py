"""The way to the coordinator, tried before Flower's SuperNode takes it: what is wrong is told in one line.

A SuperNode whose certificate ran out, who trusts another authority, or whose clock is wrong is refused by
gateway or SuperLink in words that tell an administrator little. A coordinator that can't be reached is no
fault here: the SuperNode waits for it.
"""

import http.client
import logging
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from client.courier_settings import CourierFolder
from common.certificates import SOON, expiry
from common.errors import UserError

PATIENCE = 10.0
"""Seconds to wait for an answer."""
MOST_AHEAD, MOST_BEHIND = timedelta(seconds=5), timedelta(seconds=300)
"""How far a site's clock may be off: Flower signs requests with the time, and its SuperLink takes none from
later, or from longer ago."""
REVOKED, UNWANTED = 410, 400
"""What the gateway answers to a site that was revoked, and to a certificate that it doesn't take."""

log = logging.getLogger("grandrounds.courier")


def try_way(folder: CourierFolder) -> None:
    """Ask the gateway for nothing, with our certificate.

    Raises:
        UserError: if a certificate ran out or isn't trusted, the site was revoked, or the clocks differ.
    """
    address = folder.settings.address
    _require_current(folder)
    try:
        context = ssl.create_default_context(cafile=folder.authority)
        context.load_cert_chain(folder.certificate, folder.certificate_key)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.path}: certificates and key don't fit together: {error}") from None
    host, _, port = address.rpartition(":")
    gateway = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=PATIENCE, context=context)
    try:
        gateway.request("GET", "/")
        answer = gateway.getresponse()
        status, date = answer.status, answer.getheader("Date", "")
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{address} shows a certificate that is refused ({error.verify_message}); {folder.authority} "
            f"says whom to trust, and the clock here that it is {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        ) from None
    except ssl.SSLError as error:
        raise UserError(f"{address} speaks no TLS with this site: {error.reason or error}") from None
    except (OSError, http.client.HTTPException) as error:
        log.warning("%s does not answer yet: %s", address, error)
        return
    finally:
        gateway.close()
    if status == REVOKED:
        raise UserError(f"{address}: the coordinator has revoked site {folder.settings.site}")
    if status == UNWANTED:
        raise UserError(f"{address} does not take {folder.certificate}: ask the coordinator for another kit")
    _compare_clocks(address, date)


def _require_current(folder: CourierFolder) -> None:
    try:
        last = expiry(folder.certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.certificate}: can't be read: {error}") from None
    now = datetime.now(UTC)
    if now > last:
        raise UserError(
            f"{folder.certificate} ran out on {last:%Y-%m-%d}, and it is {now:%Y-%m-%d} by the clock here: "
            "ask the coordinator for another kit"
        )
    if last - now < SOON:
        log.warning(
            "%s ends on %s: ask the coordinator for another kit", folder.certificate, f"{last:%Y-%m-%d}"
        )


def _compare_clocks(address: str, date: str) -> None:
    try:
        theirs = parsedate_to_datetime(date)
    except ValueError:
        return  # it doesn't say
    ahead = datetime.now(UTC) - theirs
    if not -MOST_BEHIND < ahead < MOST_AHEAD:
        way = "ahead of" if ahead > timedelta(0) else "behind"
        raise UserError(
            f"the clock here is {abs(ahead).total_seconds():.0f} s {way} that of {address}, which would "
            "refuse every request: set the clock that is wrong"
        )
