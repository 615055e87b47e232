"""The in-process backend behaves as Flower's transport does, whatever the apps do."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid, ServerApp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from common.config import Scalar
from simulations.benchmarks.noop_app import noop
from simulations.benchmarks.rounds import TARGETS
from simulations.inprocess import FIRST_NODE_ID, run_inprocess

Handler = Callable[[Message, Context], Message]


def serve(body: Callable[[Grid], object]) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        body(grid)

    return app


def answer(handler: Handler) -> ClientApp:
    app = ClientApp()
    app.train()(handler)
    return app


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def exchange(
    handler: Handler, nodes: int = 3, content: RecordDict | None = None, timeout: float | None = None
) -> list[Message]:
    """One round with every node."""
    replies: list[Message] = []

    def body(grid: Grid) -> None:
        messages = [Message(content or RecordDict(), node, MessageType.TRAIN) for node in grid.get_node_ids()]
        replies.extend(grid.send_and_receive(messages, timeout=timeout))

    run_inprocess({}, nodes, serve(body), answer(handler))
    return replies


def array_of(message: Message) -> np.ndarray:
    return message.content.array_records["array"]["x"].numpy()


def content_of(array: np.ndarray) -> RecordDict:
    return RecordDict({"array": ArrayRecord({"x": Array(array)})})


def run_noop(folder: Path, **changes: Scalar) -> noop.Record:
    record = folder / "record.json"
    config = {
        "rounds": 3,
        "nodes": 3,
        "payload": 100,
        "record": str(record),
        "failing-node": -1,
        "fail": False,
    }
    config |= changes
    run_inprocess(config, int(config["nodes"]), noop.server_app, noop.client_app)
    return json.loads(record.read_text())


def test_nodes_keep_their_state_between_rounds_and_apart(tmp_path: Path) -> None:
    assert run_noop(tmp_path)["turns"] == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


def test_nothing_carries_over_to_the_next_run(tmp_path: Path) -> None:
    assert run_noop(tmp_path) and run_noop(tmp_path)["turns"][0] == [1, 1, 1]


def test_a_failing_node_costs_its_own_reply_only(tmp_path: Path) -> None:
    assert run_noop(tmp_path, **{"failing-node": 1})["turns"] == [[1, 1, -1], [2, 2, -1], [3, 3, -1]]


def test_what_the_server_raises_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="told to fail"):
        run_noop(tmp_path, fail=True)


@given(st_numpy.arrays(st.sampled_from([np.int8, np.float16, np.float32, np.int64]), st_numpy.array_shapes()))
def test_arrays_arrive_as_they_left(array: np.ndarray) -> None:
    (reply,) = exchange(echo, nodes=1, content=content_of(array))
    arrived = array_of(reply)
    assert arrived.dtype == array.dtype and arrived.shape == array.shape
    assert arrived.tobytes() == np.ascontiguousarray(array).tobytes()


def test_only_bytes_cross() -> None:
    """What a handler does to the message it got changes neither the sender's copy nor another node's."""
    sent = content_of(np.zeros(4, np.float32))

    def vandal(message: Message, context: Context) -> Message:
        assert not array_of(message).any()
        message.content["array"] = ArrayRecord({"x": Array(np.ones(4, np.float32))})
        context.run_config["left"] = "behind"
        return Message(message.content, reply_to=message)

    replies = exchange(vandal, content=sent)
    assert all(array_of(reply).all() for reply in replies)
    assert not sent.array_records["array"]["x"].numpy().any()


def test_replies_name_their_sender_and_the_message_they_answer() -> None:
    seen: list[tuple[list[str], list[Message]]] = []

    def body(grid: Grid) -> None:
        messages = [
            Message(RecordDict(), node, MessageType.TRAIN, group_id="7") for node in grid.get_node_ids()
        ]
        replies = list(grid.send_and_receive(messages))
        seen.append(([message.metadata.message_id for message in messages], replies))

    run_inprocess({}, 4, serve(body), answer(echo))
    ((message_ids, replies),) = seen
    assert len(set(message_ids)) == 4
    assert [reply.metadata.reply_to_message_id for reply in replies] == message_ids
    assert [reply.metadata.src_node_id for reply in replies] == [FIRST_NODE_ID + i for i in range(4)]
    assert {reply.metadata.group_id for reply in replies} == {"7"}


def test_nodes_know_their_partition_and_the_run_config() -> None:
    def tell(message: Message, context: Context) -> Message:
        facts = {**context.node_config, "seed": context.run_config["seed"]}
        return Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=message)

    facts: list[dict[str, object]] = []

    def body(grid: Grid) -> None:
        messages = [Message(RecordDict(), node, MessageType.TRAIN) for node in grid.get_node_ids()]
        facts.extend(dict(r.content.config_records["facts"]) for r in grid.send_and_receive(messages))

    run_inprocess({"seed": 5}, 2, serve(body), answer(tell))
    assert facts == [{"partition-id": i, "num-partitions": 2, "seed": 5} for i in range(2)]


def test_a_handler_that_raises_answers_with_an_error_and_loses_its_state() -> None:
    calls: list[int] = []

    def stumble(message: Message, context: Context) -> Message:
        calls.append(len(context.state))
        context.state["count"] = ConfigRecord({"n": 1})
        if len(calls) == 1:
            raise ValueError("stumbled")
        return Message(RecordDict(), reply_to=message)

    replies: list[Message] = []

    def body(grid: Grid) -> None:
        for _ in range(3):
            replies.extend(grid.send_and_receive([Message(RecordDict(), FIRST_NODE_ID, MessageType.TRAIN)]))

    run_inprocess({}, 1, serve(body), answer(stumble))
    assert replies[0].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "stumbled" in str(replies[0].error.reason)
    assert replies[0].metadata.src_node_id == FIRST_NODE_ID
    assert [reply.has_content() for reply in replies[1:]] == [True, True]
    assert calls == [0, 0, 1]


def test_an_unknown_kind_of_message_and_a_reply_that_is_none_are_errors_too() -> None:
    (reply,) = exchange(lambda message, context: None, nodes=1)  # type: ignore[arg-type, return-value]
    assert reply.has_error()

    def body(grid: Grid) -> None:
        (reply,) = grid.send_and_receive([Message(RecordDict(), FIRST_NODE_ID, MessageType.EVALUATE)])
        assert "No evaluate function" in str(reply.error.reason)

    run_inprocess({}, 1, serve(body), answer(echo))


def test_a_message_that_answers_something_else_is_dropped() -> None:
    kept: list[Message] = []

    def stale(message: Message, context: Context) -> Message:
        kept.append(message)
        return Message(RecordDict(), reply_to=kept[0])

    def body(grid: Grid) -> None:
        rounds = [list(grid.send_and_receive([Message(RecordDict(), FIRST_NODE_ID, MessageType.TRAIN)]))]
        rounds.append(list(grid.send_and_receive([Message(RecordDict(), FIRST_NODE_ID, MessageType.TRAIN)])))
        assert [len(replies) for replies in rounds] == [1, 0]

    run_inprocess({}, 1, serve(body), answer(stale))


def test_a_slow_node_misses_the_round_and_the_others_do_not_pay_for_it() -> None:
    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.3 if context.node_config["partition-id"] == 1 else 0.1)
        return echo(message, context)

    replies = exchange(slow, nodes=3, timeout=0.2)
    assert [reply.metadata.src_node_id - FIRST_NODE_ID for reply in replies] == [0, 2]


def test_pushed_messages_are_answered_once_when_pulled() -> None:
    def body(grid: Grid) -> None:
        message_ids = list(
            grid.push_messages(
                [Message(RecordDict(), node, MessageType.TRAIN) for node in grid.get_node_ids()]
            )
        )
        assert len(list(grid.pull_messages(message_ids[:1]))) == 1
        assert len(list(grid.pull_messages(message_ids))) == 2
        assert not list(grid.pull_messages(message_ids))

    run_inprocess({}, 3, serve(body), answer(echo))


def test_a_message_to_nobody_is_not_delivered() -> None:
    def body(grid: Grid) -> None:
        messages = [Message(RecordDict(), node, MessageType.TRAIN) for node in (99, FIRST_NODE_ID)]
        assert [r.metadata.src_node_id for r in grid.send_and_receive(messages)] == [FIRST_NODE_ID]

    run_inprocess({}, 1, serve(body), answer(echo))


def test_the_tap_sees_the_very_bytes_and_their_number_can_be_computed_from_the_reply() -> None:
    seen: list[tuple[Message, bytes]] = []
    received: list[int] = []

    def body(grid: Grid) -> None:
        content = content_of(np.arange(100, dtype=np.int8))
        messages = [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]
        received.extend(message_to_proto(reply).ByteSize() for reply in grid.send_and_receive(messages))

    run_inprocess({}, 2, serve(body), answer(echo), lambda reply, wire: seen.append((reply, wire)))
    assert [len(wire) for _, wire in seen] == received
    assert all(ProtoMessage.FromString(wire) == message_to_proto(reply) for reply, wire in seen)


@pytest.mark.parametrize("nodes", TARGETS)
def test_a_round_is_fast_enough(tmp_path: Path, nodes: int) -> None:
    seconds = run_noop(tmp_path, rounds=8, nodes=nodes, payload=1000)["seconds"]
    assert statistics.median(seconds) <= TARGETS[nodes]
