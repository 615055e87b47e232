"""What keeps a site from the coordinator is told in one line, by a real handshake with a real server."""

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from client.courier_settings import CourierFolder, CourierSettings
from client.first_contact import try_way
from common.errors import UserError
from server.federation.authority import Credentials, certify_courier, certify_server, found_authority


@pytest.fixture(scope="module")
def authority() -> Credentials:
    return found_authority("trial")


@contextmanager
def gateway(
    folder: Path, shown: Credentials, trusts: Credentials, status: int = 403, ahead: float = 0.0
) -> Iterator[str]:
    """Serve at a free port, with a clock that is ahead by so many seconds."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            self.send_header(
                "Date", format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True)
            )
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    for name, content in (("shown.crt", shown.certificate), ("shown.key", shown.key)):
        (folder / name).write_bytes(content)
    (folder / "trusted.crt").write_bytes(trusts.certificate)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "trusted.crt")
    context.load_cert_chain(folder / "shown.crt", folder / "shown.key")
    context.verify_mode = ssl.CERT_REQUIRED
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def courier(folder: Path, own: Credentials, trusts: Credentials, address: str) -> CourierFolder:
    for name, content in (
        ("ca.crt", trusts.certificate),
        ("courier.crt", own.certificate),
        ("courier.key", own.key),
    ):
        (folder / name).write_bytes(content)
    settings = CourierSettings(site="north", address=address, bundle="0" * 64, custodian="unix:/a")
    return CourierFolder(folder, settings)


def test_all_is_well(tmp_path, authority):
    with gateway(tmp_path, certify_server(authority, ["127.0.0.1"]), authority) as address:
        try_way(courier(tmp_path, certify_courier(authority, "north"), authority, address))


def test_a_coordinator_that_is_not_there_yet_is_no_fault(tmp_path, authority):
    try_way(courier(tmp_path, certify_courier(authority, "north"), authority, "127.0.0.1:1"))


@pytest.mark.parametrize(
    ("ahead", "says"),
    [(3600.0, "3600 s behind|3599 s behind"), (-3600.0, "360[01] s ahead"), (-10.0, "1[01] s ahead")],
)
def test_a_clock_that_is_wrong_is_named_with_what_it_is_off_by(tmp_path, authority, ahead, says):
    server = certify_server(authority, ["127.0.0.1"])
    with gateway(tmp_path, server, authority, ahead=ahead) as address, pytest.raises(UserError, match=says):
        try_way(courier(tmp_path, certify_courier(authority, "north"), authority, address))


@pytest.mark.parametrize(
    ("status", "says"), [(410, "has revoked site north"), (400, "does not take .*courier.crt")]
)
def test_a_site_that_is_not_let_in_is_told(tmp_path, authority, status, says):
    server = certify_server(authority, ["127.0.0.1"])
    with gateway(tmp_path, server, authority, status) as address, pytest.raises(UserError, match=says):
        try_way(courier(tmp_path, certify_courier(authority, "north"), authority, address))


def test_a_certificate_of_ours_that_ran_out_is_told_with_its_day(tmp_path, authority):
    own = certify_courier(authority, "north", timedelta(minutes=-1))
    with pytest.raises(UserError, match=r"courier.crt ran out on \d{4}-\d\d-\d\d"):
        try_way(courier(tmp_path, own, authority, "127.0.0.1:1"))


@pytest.mark.parametrize(("days", "warns"), [(29, True), (31, False)])
def test_a_certificate_of_ours_that_ends_soon_is_told_at_the_start(tmp_path, authority, caplog, days, warns):
    own = certify_courier(authority, "north", timedelta(days=days))
    with caplog.at_level("WARNING", "grandrounds.courier"):
        try_way(courier(tmp_path, own, authority, "127.0.0.1:1"))
    assert any("ask the coordinator for another kit" in line for line in caplog.messages) is warns


def test_a_certificate_of_the_coordinators_that_ran_out_is_told(tmp_path, authority):
    own = certify_courier(authority, "north")
    server = certify_server(authority, ["127.0.0.1"], timedelta(minutes=-1))
    with gateway(tmp_path, server, authority) as address, pytest.raises(UserError, match="has expired"):
        try_way(courier(tmp_path, own, authority, address))


def test_a_coordinator_of_another_authority_or_host_is_told(tmp_path, authority):
    other = found_authority("other")
    own = certify_courier(authority, "north")
    with (
        gateway(tmp_path, certify_server(other, ["127.0.0.1"]), authority) as address,
        pytest.raises(UserError, match="a certificate that is refused"),
    ):
        try_way(courier(tmp_path, own, authority, address))
    with (
        gateway(tmp_path, certify_server(authority, ["elsewhere.example"]), authority) as address,
        pytest.raises(UserError, match="IP address mismatch"),
    ):
        try_way(courier(tmp_path, own, authority, address))
