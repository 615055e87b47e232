"""The courier's end of the door: the four questions, put to the custodian over its socket.

Whatever happens on the way, what comes back is an answer of the protocol. A custodian that can't be
reached, breaks off, or says something else than an answer makes a refusal, `unavailable`; no text from the
site's process travels on. A call that was handed over is not repeated: the custodian may have charged for
it, and whether it is asked again is the coordinator's choice.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc

from client.custodian_pb2 import Body
from client.custodian_pb2_grpc import CustodianStub
from common.messages import MessageError, Refusal, Rule, decode_answer

PATIENCE = 10.0
"""Seconds to wait for a custodian that is not there: its supervisor may be starting it."""
LONGEST_TASK = 12 * 3600.0
"""Seconds until an answer is given up: as long as Flower keeps a message."""
OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 1 << 30),
    ("grpc.max_send_message_length", 1 << 30),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
UNAVAILABLE = Refusal(Rule.UNAVAILABLE).encode()


class Connection:
    """A custodian at the other end of a channel; `client.app.Site` by form.

    Args:
        channel: A gRPC channel to it.
        patience: Seconds to wait for it to be there.
    """

    def __init__(self, channel: grpc.Channel, patience: float = PATIENCE) -> None:
        """Wrap the channel; nothing is sent yet."""
        self._channel, self._patience = channel, patience
        self._met = False
        self._stub = CustodianStub(channel)  # type: ignore[no-untyped-call]

    def offer(self, body: bytes) -> bytes:
        """Ask whether the site knows the run's proxy."""
        return self._ask(self._stub.Offer, body)

    def accept_proxy(self, body: bytes) -> bytes:
        """Bring the proxy."""
        return self._ask(self._stub.AcceptProxy, body)

    def learn(self, body: bytes) -> bytes:
        """Bring one round's task, take back the release."""
        return self._ask(self._stub.Learn, body)

    def deliver(self, body: bytes) -> bytes:
        """Bring the final student."""
        return self._ask(self._stub.Deliver, body)

    def _ask(self, call: Any, body: bytes) -> bytes:
        try:
            if not self._met:  # watching a channel costs a millisecond
                grpc.channel_ready_future(self._channel).result(timeout=self._patience)
            answer: bytes = call(Body(body=body), timeout=LONGEST_TASK).body
            decode_answer(answer)
        except (grpc.RpcError, grpc.FutureTimeoutError, MessageError):
            self._met = False
            return UNAVAILABLE
        self._met = True
        return answer


@lru_cache(maxsize=8)
def connect(address: str, certificates: str = "") -> Connection:
    """Open a connection that lasts as long as the process.

    Args:
        address: `unix:/path/of.sock` or `tcp:host:port`.
        certificates: For TCP, the folder with `ca.crt`, `courier.crt` and `courier.key`.

    Raises:
        ConnectionError: if the certificates can't be read.
    """
    if not address.startswith("tcp:"):
        return Connection(grpc.insecure_channel(address, OPTIONS))
    try:
        folder = Path(certificates)
        files = [(folder / name).read_bytes() for name in ("ca.crt", "courier.key", "courier.crt")]
    except OSError as error:
        raise ConnectionError(f"{certificates}: {error.strerror}") from None
    credentials = grpc.ssl_channel_credentials(*files)
    return Connection(grpc.secure_channel(address.removeprefix("tcp:"), credentials, OPTIONS))
