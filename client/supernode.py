"""Flower's SuperNode, with a certificate of its own to show.

Flower 1.41 checks the coordinator's certificate but can't show one (`--root-certificates` "is not a client
certificate for mTLS"). Its HTTP client takes an `ssl.SSLContext`, though, so this program is Flower's
SuperNode with a client whose context holds the site's certificate. All else is Flower's own.

    python -m client.supernode CERTIFICATE KEY [arguments of flower-supernode]
"""

import os
import ssl
import sys
from typing import Any

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.flower_seams import exchange

LOST = 1
"""Exit code after the connection to the coordinator ended."""


class CertifiedClient(FleetHttpClient):
    """Flower's client of the fleet API, which shows a certificate where it is asked for one."""

    certificate: str
    key: str

    def __init__(self, base_url: str, *, verify: Any = True, **options: Any) -> None:
        """Add the certificate to what Flower trusts."""
        if not isinstance(verify, ssl.SSLContext):
            raise TypeError("no root certificates were given: the coordinator could be anybody")
        verify.minimum_version = ssl.TLSVersion.TLSv1_2
        verify.load_cert_chain(self.certificate, self.key)
        super().__init__(base_url, verify=verify, **options)


def main() -> None:
    """Become the SuperNode."""
    _, CertifiedClient.certificate, CertifiedClient.key, *arguments = sys.argv
    exchange(fleet_http_connection, "FleetHttpClient", CertifiedClient)
    start_parent_process_monitor(os.getppid())  # neither outlives the other
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()
    # It returns when an answer or a handshake ends its connection for good, and threads of its own would then
    # keep alive a process that does nothing. Whoever started it is to start it again.
    sys.stderr.flush()
    os._exit(LOST)


if __name__ == "__main__":
    main()
