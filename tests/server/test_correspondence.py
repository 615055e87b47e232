"""Letters: gone nodes are named, and nothing waits for ever."""

import time
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.config import RunConfig
from common.envelope import seal, unseal
from common.messages import Receipt, Task
from common.plan import plan_of
from common.preprocessing import NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records
from server.admission import Member
from server.correspondence import ask_round, deliver_student
from simulations.inprocess import FIRST_NODE_ID, run_inprocess

VALUES = np.random.default_rng(0).normal(size=5)
RECORDS = Records({"a": VALUES}, np.array(["no", "yes", "no", "yes", "no"]), None, {})
PREPROCESSING = Preprocessing.fit(RECORDS, [NumericSpec(name="a")], ("no", "yes"))
PROXY = Proxy(PREPROCESSING, PREPROCESSING.encode(RECORDS).x, PREPROCESSING.encode(RECORDS).y)


class Sites(ClientApp):
    """Sites that give a receipt for whatever they are sent."""

    def __call__(self, message: Message, context) -> Message:
        return Message(seal(Receipt(PROXY.digest).encode()), reply_to=message)


def with_grid(body, sites: ClientApp, nodes: int = 3) -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context) -> None:
        body(grid)

    run_inprocess({}, nodes, app, sites)


def task() -> Task:
    plan = plan_of(RunConfig(), study="s", proxy_digest=PROXY.digest, classes=2)
    return Task(plan, 1, np.arange(5, dtype=np.int32), np.full((5, 2), np.log(0.5), dtype=np.float16))


def test_a_node_that_is_gone_is_left_out_by_name():
    plan = task().plan
    members = {"here": Member(FIRST_NODE_ID, "here", 1, plan), "gone": Member(99, "gone", 1, plan)}

    def body(grid: Grid) -> None:
        admitted = ask_round(grid, dict.fromkeys(members, task()), members, {}, 5.0, [].append)
        assert admitted.left_out == {
            "gone": "its node is gone",
            "here": "an answer of another kind than a release",
        }
        assert set(deliver_student(grid, b"student", members, 5.0)) == {"here", "gone"}

    with_grid(body, Sites())


def test_each_site_gets_its_own_ledger_head_back():
    seen = {}

    class Reading(Sites):
        def __call__(self, message: Message, context) -> Message:
            seen[int(context.node_config["partition-id"])] = Task.decode(unseal(message.content))
            return Message(seal(b""), reply_to=message)

    members = {f"site-{k}": Member(FIRST_NODE_ID + k, f"site-{k}", 1, task().plan) for k in range(2)}

    def body(grid: Grid) -> None:
        ask_round(grid, dict.fromkeys(members, task()), members, {"site-1": bytes([7]) * 32}, 5.0, [].append)

    with_grid(body, Reading())
    assert seen[0].head == bytes(32) and seen[1].head == bytes([7]) * 32
    assert seen[0].digest() == seen[1].digest() == replace(task(), head=bytes([1]) * 32).digest()


@pytest.mark.parametrize("timeout", [0.05, 0.3])
def test_nobody_is_waited_for_longer_than_the_timeout(timeout):
    class Mute(Sites):
        def __call__(self, message: Message, context) -> Message:
            other = Message(message.content, context.node_id, "query.offer")
            other.metadata.__dict__["_message_id"] = "another"
            return Message(seal(b""), reply_to=other)

    members = {"here": Member(FIRST_NODE_ID, "here", 1, task().plan)}

    def body(grid: Grid) -> None:
        began = time.monotonic()
        assert deliver_student(grid, b"student", members, timeout) == {"here": "no answer in time"}
        assert timeout <= time.monotonic() - began < timeout + 0.7

    with_grid(body, Mute())
