"""Places see each other through a drill's network only, as it lets them, and every packet is counted."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from common.errors import UserError
from simulations.drills.network import Network, require_network

pytestmark = pytest.mark.machine

SERVE = (
    "import socket; s = socket.create_server(('0.0.0.0', 700)); print(flush=True);"
    "s.accept()[0].sendall(b'yes')"
)
ASK = "import socket, sys; s = socket.create_connection((sys.argv[1], 700), 2); print(s.recv(9).decode())"


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        require_network()
    except UserError as reason:
        pytest.fail(f"{reason}. Deselect this by -m 'not machine', and know that it is not tested")
    with Network.between(["here", "there"]) as made:
        yield made


def asked(network: Network, place: str, address: str) -> bool:
    command = [*network.prefix(place), sys.executable, "-c", ASK, address]
    return subprocess.run(command, capture_output=True, check=False).stdout == b"yes\n"


@pytest.fixture
def answering(network) -> Iterator[str]:
    command = [*network.prefix("there"), sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdout.readline()
        yield network.address("there")
        server.kill()


def test_what_is_sent_arrives_and_is_counted_with_where_it_went(network, answering):
    assert asked(network, "here", answering)
    sent = network.sent["here"]
    assert set(sent.to) == {(answering, 6, 700)} and sent.packets == sent.to.total() >= 4
    assert sent.bytes >= 40 * sent.packets  # headers of IP and TCP at least


@pytest.mark.parametrize("broken", ["cut", "lost"])
def test_a_line_that_is_down_or_loses_everything_lets_nothing_through(network, answering, broken):
    network.cut |= {"there"} if broken == "cut" else set()
    network.loss = 1.0 if broken == "lost" else 0.0
    assert not asked(network, "here", answering)
    network.cut.clear()
    network.loss = 0.0
    assert asked(network, "here", answering)


def test_whoever_asks_for_anybody_else_is_noted_and_hears_nothing(network):
    assert not asked(network, "here", "192.0.2.7")
    assert ("192.0.2.7", 6, 700) in network.sent["here"].to
    assert not asked(network, "a custodian", network.address("here"))
    assert network.sent["there"].packets == 0
