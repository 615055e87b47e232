"""Letters: late nodes are waited for, gone ones are named, and nothing waits for ever."""

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.config import RunConfig
from common.envelope import seal, unseal
from common.messages import Greeting, Offer, Receipt, Task
from common.plan import plan_of
from common.preprocessing import NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records
from server import correspondence
from server.admission import Member
from server.correspondence import ask_round, call_roll, deliver_student
from simulations import inprocess
from simulations.inprocess import FIRST_NODE_ID, run_inprocess

VALUES = np.random.default_rng(0).normal(size=5)
RECORDS = Records({"a": VALUES}, np.array(["no", "yes", "no", "yes", "no"]), None, {})
PREPROCESSING = Preprocessing.fit(RECORDS, [NumericSpec(name="a")], ("no", "yes"))
PROXY = Proxy(PREPROCESSING, PREPROCESSING.encode(RECORDS).x, PREPROCESSING.encode(RECORDS).y)
AGREED = {f"site-{k}": 10 * (k + 1) for k in range(3)}


class Sites(ClientApp):
    """Sites that greet, and have the proxy if their place is in `informed`."""

    def __init__(self, informed: Iterable[int] = ()) -> None:
        super().__init__()
        self.informed, self.sent = set(informed), []

    def __call__(self, message: Message, context) -> Message:
        place, body = int(context.node_config["partition-id"]), unseal(message.content)
        self.sent.append((message.metadata.message_type, place))
        if message.metadata.message_type == "query.offer":
            assert Offer.decode(body).proxy_digest == PROXY.digest
            answer = Greeting(f"site-{place}", 10 * (place + 1), place in self.informed).encode()
        else:
            answer = Receipt(PROXY.digest).encode()
        return Message(seal(answer), reply_to=message)


def with_grid(body, sites: ClientApp, nodes: int = 3) -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context) -> None:
        body(grid)

    run_inprocess({}, nodes, app, sites)


def test_the_proxy_goes_once_to_those_who_lack_it():
    sites = Sites(informed=[1])

    def body(grid: Grid) -> None:
        roll = call_roll(grid, PROXY, AGREED, 5.0)
        assert roll.absent == {}
        assert roll.members == {
            f"site-{k}": Member(FIRST_NODE_ID + k, f"site-{k}", 10 * (k + 1)) for k in range(3)
        }

    with_grid(body, sites)
    assert [place for kind, place in sites.sent if kind == "train.proxy"] == [0, 2]


def test_nodes_that_connect_late_are_waited_for_but_not_for_ever(monkeypatch):
    looks = []

    class Late(inprocess.InProcessGrid):
        def get_node_ids(self) -> list[int]:
            looks.append(time.monotonic())
            return super().get_node_ids()[: len(looks)]

    monkeypatch.setattr(inprocess, "InProcessGrid", Late)
    monkeypatch.setattr(correspondence, "LONGEST_PAUSE", 0.01)

    def body(grid: Grid) -> None:
        assert len(call_roll(grid, PROXY, AGREED, 5.0).members) == 3
        monkeypatch.setattr(correspondence, "PATIENCE", 0.05)
        assert len(call_roll(grid, PROXY, AGREED | {"elsewhere": 5}, 5.0).members) == 3

    with_grid(body, Sites())


def test_a_site_takes_part_under_the_name_and_the_size_that_were_agreed(monkeypatch):
    def body(grid: Grid) -> None:
        roll = call_roll(grid, PROXY, {"site-0": 10, "site-1": 19, "site-9": 5}, 5.0)
        assert set(roll.members) == {"site-0"}
        assert roll.absent == {
            "site-1": "declares 20, 19 was agreed",
            f"node {FIRST_NODE_ID + 2}": "calls itself site-2, which is no site of this study",
            "site-9": "nobody answered to this name",
        }

    monkeypatch.setattr(correspondence, "PATIENCE", 0.05)
    with_grid(body, Sites(informed=range(3)))


def task() -> Task:
    plan = plan_of(RunConfig(), study="s", proxy_digest=PROXY.digest, classes=2)
    return Task(plan, 1, np.arange(5, dtype=np.int32), np.full((5, 2), np.log(0.5), dtype=np.float16))


def test_a_node_that_is_gone_is_left_out_by_name():
    members = {"here": Member(FIRST_NODE_ID, "here", 1), "gone": Member(99, "gone", 1)}

    def body(grid: Grid) -> None:
        admitted = ask_round(grid, task(), members, {}, 5.0)
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

    members = {f"site-{k}": Member(FIRST_NODE_ID + k, f"site-{k}", 1) for k in range(2)}

    def body(grid: Grid) -> None:
        ask_round(grid, task(), members, {"site-1": bytes([7]) * 32}, 5.0)

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

    def body(grid: Grid) -> None:
        began = time.monotonic()
        roll = call_roll(grid, PROXY, AGREED, timeout)
        assert timeout <= time.monotonic() - began < timeout + 0.7
        assert set(roll.absent.values()) == {"no answer in time", "nobody answered to this name"}
        assert not roll.members

    with_grid(body, Mute())
