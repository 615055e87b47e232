"""A federation in one process: the real ServerApp and ClientApp, without Ray.

Flower ships one simulation backend, Ray, whose start alone takes longer than our default scenario.
`InProcessGrid` stands in for it behind the interface that a ServerApp knows, `Grid`. One round of
transport:

1. The ServerApp builds a `Message` for each node and calls `grid.send_and_receive`.
2. The grid stamps an id on the message and **serialises** it, as it would for the SuperLink.
3. Node by node, in the order of sending, the bytes are parsed into a fresh message, the ClientApp handles
   it with the node's `Context`, and the reply is serialised.
4. The reply's bytes are parsed again and handed to the ServerApp, which matches it by `reply_to_message_id`.

Only bytes cross, so apps share no object and what works here works over a network. As with Flower, a
handler that raises becomes an `Error` reply and loses what it changed in `Context.state`, which lives as
long as the run; and a message that isn't a reply to the one just received gets nowhere.

Nodes work one after another but are timed as if side by side: `timeout` counts from the start of each
node's own turn. A handler is never interrupted, so one that hangs, hangs the run.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import ClientAppException, LoadClientAppError
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.server_app import LoadServerAppError
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.config import Scalar

log = logging.getLogger(__name__)

SERVER_APP = "server.app:app"
CLIENT_APP = "client.app:app"
FIRST_NODE_ID = SUPERLINK_NODE_ID + 1
RUN_ID = 1
TASK_ID = 1

ReplyTap = Callable[[Message, bytes], None]
"""Sees each reply as the ServerApp will, with the bytes it came in."""


def run_inprocess(
    run_config: Mapping[str, Scalar],
    num_nodes: int,
    server_app: ServerApp | None = None,
    client_app: ClientApp | None = None,
    on_reply: ReplyTap | None = None,
) -> Context:
    """Run a ServerApp against `num_nodes` nodes that each run the ClientApp, all in this process.

    Node `FIRST_NODE_ID + i` finds `partition-id` i and `num-partitions` `num_nodes` in its node config, as
    in Flower's own simulation.

    Args:
        run_config: The whole run config, flat, as both apps find it in their `Context`.
        num_nodes: How many nodes there are.
        server_app: The app to run; this project's own by default.
        client_app: The app each node runs; this project's own by default.
        on_reply: Called with each reply on its way to the server.

    Returns:
        The ServerApp's context when it ended.

    Raises:
        Exception: What the ServerApp raises; what a ClientApp raises reaches it as an `Error` reply.
    """
    project = Path(__file__).resolve().parents[1]
    server_app = server_app or load_app(SERVER_APP, LoadServerAppError, project)
    client_app = client_app or load_app(CLIENT_APP, LoadClientAppError, project)
    # `Message(...)` in a ServerApp takes its sender from this, the identity of the process it runs in.
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, TASK_ID, SUPERLINK_NODE_ID
    grid = InProcessGrid(client_app, run_config, num_nodes, on_reply)
    context = Context(
        run_id=RUN_ID,
        node_id=SUPERLINK_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    server_app(grid=grid, context=context)
    return context


class InProcessGrid(Grid):
    """Flower's `Grid` over nodes that live in this process; see the module's docstring.

    Args:
        client_app: The app that every node runs.
        run_config: The run config that every node's `Context` carries.
        num_nodes: How many nodes there are.
        on_reply: Called with each reply on its way to the server.
    """

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, Scalar],
        num_nodes: int,
        on_reply: ReplyTap | None = None,
    ) -> None:
        """Register the nodes; nothing runs yet."""
        self._client_app = client_app
        self._run_config = dict(run_config)
        self._on_reply = on_reply
        self._run = Run.create_empty(RUN_ID)
        self._node_configs: dict[int, dict[str, Scalar]] = {
            FIRST_NODE_ID + i: {"partition-id": i, "num-partitions": num_nodes} for i in range(num_nodes)
        }
        self._states = dict.fromkeys(self._node_configs, b"")  # each node's Context.state, serialised
        self._inbox: dict[str, bytes] = {}  # replies not yet pulled, by the id of the message they answer
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Set the run, which the SuperLink does in a deployment."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run; only its id means something here."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message; `Message(...)` does the same and is what Flower recommends."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """List the nodes, in order of their partition."""
        return list(self._node_configs)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver messages and keep the replies until they are pulled.

        Returns:
            Ids of the delivered messages; one to a node that doesn't exist is left out with a warning.
        """
        delivered = []
        for message in messages:
            self._sent += 1
            # As long as a deployment's ids (SHA-256 in hex), so that the size of a message is true to life.
            message_id = f"{self._sent:064x}"
            message.metadata.__dict__["_message_id"] = message_id
            node_id = message.metadata.dst_node_id
            if node_id not in self._node_configs:
                log.warning("there is no node %d: its message was not delivered", node_id)
                continue
            delivered.append(message_id)
            reply = self._handle(message_to_proto(message).SerializeToString())
            if reply is not None:
                self._inbox[message_id] = reply
        return delivered

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand over the replies to these messages, once each."""
        replies = []
        for message_id in message_ids:
            wire = self._inbox.pop(message_id, None)
            if wire is not None:
                reply = message_from_proto(ProtoMessage.FromString(wire))
                if self._on_reply is not None:
                    self._on_reply(reply, wire)
                replies.append(reply)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Deliver messages and return the replies in the order of sending.

        Args:
            messages: What to send.
            timeout: Seconds for each node, None for ever; a later reply waits for `pull_messages`.
        """
        replies: list[Message] = []
        for message in messages:
            started = time.monotonic()
            message_ids = self.push_messages([message])
            if timeout is None or time.monotonic() - started <= timeout:
                replies += self.pull_messages(message_ids)
            else:
                log.warning("node %d took longer than %g s", message.metadata.dst_node_id, timeout)
        return replies

    def _handle(self, wire: bytes) -> bytes | None:
        """Be the node: from a message's bytes to its reply's, or None if that answers something else."""
        message = message_from_proto(ProtoMessage.FromString(wire))
        node_id = message.metadata.dst_node_id
        context = Context(
            run_id=message.metadata.run_id,
            node_id=node_id,
            node_config=dict(self._node_configs[node_id]),
            state=recorddict_from_proto(ProtoRecordDict.FromString(self._states[node_id])),
            run_config=dict(self._run_config),
        )
        message_id = message.metadata.message_id
        try:
            reply = self._client_app(message, context)
            reply_proto = message_to_proto(reply)
            state = recorddict_to_proto(context.state).SerializeToString()
        except Exception as error:
            log.exception("the ClientApp of node %d raised", node_id)
            failure = ClientAppException(str(error))
            reason = f"{type(failure)}:<'{failure}'>"  # Flower's wording
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
            return message_to_proto(reply).SerializeToString()
        self._states[node_id] = state
        if reply.metadata.reply_to_message_id != message_id:
            log.warning("node %d sent a message that is no reply to the one it got: dropped", node_id)
            return None
        return reply_proto.SerializeToString()
