"""The roll: who is late is let in any time, who is back goes on, and nobody holds a round up."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from hypothesis import given
from hypothesis import strategies as st

import server.roll
from common.config import RunConfig
from common.envelope import seal, unseal
from common.messages import Greeting, Offer, Receipt, Refusal, Rule
from common.plan import plan_of
from common.preprocessing import NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records
from server import correspondence
from server.admission import AWAY, Member, rule_in
from server.roll import MOST_DELIVERIES, Roll
from server.weights import weights_of
from simulations import inprocess
from simulations.inprocess import FIRST_NODE_ID, run_inprocess

VALUES = np.random.default_rng(0).normal(size=5)
RECORDS = Records({"a": VALUES}, np.array(["no", "yes", "no", "yes", "no"]), None, {})
PREPROCESSING = Preprocessing.fit(RECORDS, [NumericSpec(name="a")], ("no", "yes"))
PROXY = Proxy(PREPROCESSING, PREPROCESSING.encode(RECORDS).x, PREPROCESSING.encode(RECORDS).y)
PLAN = plan_of(RunConfig(), study="s", proxy_digest=PROXY.digest, classes=2)
AGREED = {f"site-{k}": 10 * (k + 1) for k in range(3)}
OWNERS = {FIRST_NODE_ID + k: site for k, site in enumerate(AGREED)}


class Sites(ClientApp):
    """Sites that greet, take the proxy, and are asleep or broken where a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.informed: set[int] = set()
        self.mute: set[int] = set()
        self.broken: set[int] = set()
        self.dying: dict[int, list[int]] = {}
        self.names: dict[int, str] = {}
        self.caps = dict.fromkeys(range(3), (1.0, 200))
        self.sent: list[tuple[str, int]] = []

    def __call__(self, message: Message, context) -> Message:
        place, kind = int(context.node_config["partition-id"]), message.metadata.message_type
        self.sent.append((kind, place))
        if self.dying.get(place):
            return Message(Error(self.dying[place].pop(), "died"), reply_to=message)
        if place in self.mute:
            message.metadata.__dict__["_message_id"] = "another"
        if kind == "query.offer":
            assert Offer.decode(unseal(message.content)).proxy_digest == PROXY.digest
            name, size = self.names.get(place, f"site-{place}"), 10 * (place + 1)
            answer = Greeting(name, size, *self.caps[place], place in self.informed).encode()
        elif place in self.broken:
            answer = Refusal(Rule.UNAVAILABLE).encode()
        else:
            answer = Receipt(PROXY.digest).encode()
        return Message(seal(answer), reply_to=message)

    def of_kind(self, kind: str) -> list[int]:
        return [place for sent, place in self.sent if sent == kind]


class Gathering(inprocess.InProcessGrid):
    """Only the nodes in `connected` are there."""

    connected: set[int]

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node - FIRST_NODE_ID in self.connected]


def with_grid(body: Callable[[Grid], None], sites: ClientApp) -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context) -> None:
        body(grid)

    run_inprocess({}, 3, app, sites)


@pytest.fixture
def gathering(monkeypatch):
    monkeypatch.setattr(inprocess, "InProcessGrid", Gathering)
    monkeypatch.setattr(correspondence, "PATIENCE", 0.05)
    monkeypatch.setattr(correspondence, "LONGEST_PAUSE", 0.01)
    Gathering.connected = {0, 1, 2}
    return Gathering


# ---- The first call ----


def test_the_proxy_goes_once_to_those_who_lack_it():
    sites = Sites()
    sites.informed = {1}

    def body(grid: Grid) -> None:
        roll = Roll(grid, PROXY, PLAN, AGREED)
        roll.call(5.0)
        roll.call(0.0)
        assert roll.absent == {}
        assert roll.members == {
            f"site-{k}": Member(FIRST_NODE_ID + k, f"site-{k}", 10 * (k + 1), PLAN) for k in range(3)
        }

    with_grid(body, sites)
    assert sites.of_kind("train.proxy") == [0, 2]
    assert sites.of_kind("query.offer") == [0, 1, 2]


def test_nodes_that_connect_late_are_waited_for_but_not_for_ever(gathering, monkeypatch):
    looks = []

    def one_more_each_time(self) -> list[int]:
        looks.append(time.monotonic())
        return [FIRST_NODE_ID + k for k in range(3)][: len(looks)]

    monkeypatch.setattr(Gathering, "get_node_ids", one_more_each_time)

    def body(grid: Grid) -> None:
        for agreed in (AGREED, AGREED | {"elsewhere": 5}):
            roll = Roll(grid, PROXY, PLAN, agreed)
            roll.call(5.0)
            assert len(roll.members) == 3

    with_grid(body, Sites())


def test_a_site_takes_part_under_the_name_and_the_size_that_were_agreed(gathering):
    def body(grid: Grid) -> None:
        roll = Roll(grid, PROXY, PLAN, {"site-0": 10, "site-1": 19, "site-9": 5})
        roll.call(5.0)
        assert set(roll.members) == {"site-0"}
        assert roll.absent == {
            "site-1": "declares 20, 19 was agreed",
            f"node {FIRST_NODE_ID + 2}": "calls itself site-2, which is no site of this study",
            "site-9": "nobody answered to this name",
        }

    with_grid(body, Sites())


@pytest.mark.parametrize("timeout", [0.05, 0.3])
def test_the_first_call_waits_no_longer_than_its_timeout_and_later_ones_not_at_all(timeout):
    sites = Sites()
    sites.mute = {0, 1, 2}

    def body(grid: Grid) -> None:
        roll, began = Roll(grid, PROXY, PLAN, AGREED), time.monotonic()
        roll.call(timeout)
        assert timeout <= time.monotonic() - began < timeout + 0.7
        assert set(roll.absent.values()) == {"no answer in time", "nobody answered to this name"}
        began = time.monotonic()
        roll.call(0.0)
        assert time.monotonic() - began < 0.2
        assert not roll.members

    with_grid(body, sites)
    assert len(sites.sent) == 3  # a letter that is open is not written again


@pytest.mark.parametrize("code", AWAY)
def test_a_site_that_dies_when_it_is_greeted_is_waited_for_if_it_is_needed(gathering, monkeypatch, code):
    monkeypatch.setattr(server.roll, "REST", 0.01)
    sites = Sites()

    def body(grid: Grid) -> None:
        for deaths, needed, come in ((2, 3, 3), (2, 2, 2), (1000, 3, 2)):
            sites.dying = {1: [code] * deaths}
            roll = Roll(grid, PROXY, PLAN, AGREED, owners=lambda: OWNERS)
            roll.call(0.5, needed)
            assert len(roll.members) == come
            assert roll.absent == ({} if come == 3 else {"site-1": AWAY[code]})

    with_grid(body, sites)


def test_who_refuses_is_not_waited_for(gathering):
    sites = Sites()
    sites.broken = {1}

    def body(grid: Grid) -> None:
        roll, began = Roll(grid, PROXY, PLAN, AGREED), time.monotonic()
        roll.call(60.0, 3)
        assert len(roll.members) == 2 and time.monotonic() - began < 10

    with_grid(body, sites)


# ---- Later calls ----


def test_who_connects_between_rounds_joins(gathering):
    sites = Sites()
    gathering.connected = {0}

    def body(grid: Grid) -> None:
        roll = Roll(grid, PROXY, PLAN, AGREED)
        roll.call(5.0)
        assert set(roll.members) == {"site-0"}
        assert set(roll.absent) == {"site-1", "site-2"}
        gathering.connected = {0, 1, 2}
        roll.call(0.0)
        assert list(roll.members) == ["site-0", "site-1", "site-2"] and not roll.absent

    with_grid(body, sites)
    assert sorted(sites.of_kind("train.proxy")) == [0, 1, 2]


def test_who_comes_back_through_another_node_keeps_its_plan(gathering):
    sites = Sites()
    sites.names[2] = "site-0"
    gathering.connected = {0, 1}
    agreed = {"site-0": 30, "site-1": 20}

    def body(grid: Grid) -> None:
        roll = Roll(grid, PROXY, PLAN, {"site-0": 10, "site-1": 20})
        roll.call(5.0)
        first = roll.members["site-0"]
        gathering.connected = {0, 1, 2}
        roll.call(0.0)
        assert roll.absent == {f"node {FIRST_NODE_ID + 2}": "calls itself site-0, as another node does"}
        gathering.connected = {1, 2}
        roll.agreed = agreed  # the other node declares 30
        sites.caps[2] = (0.1, 3)
        roll.call(0.0)
        back = roll.members["site-0"]
        assert back.node_id == FIRST_NODE_ID + 2 and back.plan == first.plan

    with_grid(body, sites)


def test_a_name_is_taken_from_its_own_sites_node_only(gathering):
    """site-0 is away, and another site's node answers in its name; then it is back, under another key."""
    sites = Sites()
    sites.names = {1: "site-0", 2: "site-2"}
    gathering.connected = {1, 2}
    owners = {FIRST_NODE_ID + 1: "site-1"}
    agreed = {"site-0": 20, "site-1": 20, "site-2": 30}

    def body(grid: Grid) -> None:
        believed = Roll(grid, PROXY, PLAN, agreed)
        believed.call(5.0)
        assert believed.members["site-0"].node_id == FIRST_NODE_ID + 1  # what keys are there to prevent

        roll = Roll(grid, PROXY, PLAN, agreed, owners=lambda: owners)
        roll.call(5.0)
        assert not roll.members
        assert roll.absent == {
            "site-1": "refused: foreign-node: site-1's node calls itself site-0",
            f"node {FIRST_NODE_ID + 2}": "refused: foreign-node: a node of no site calls itself site-2",
            "site-0": "nobody answered to this name",
            "site-2": "nobody answered to this name",
        }
        assert {rule_in(roll.absent[site]) for site in ("site-1", "site-0")} == {"foreign-node", None}

        owners[FIRST_NODE_ID + 2] = "site-2"  # registered while the study is under way
        owners[FIRST_NODE_ID] = "site-0"
        gathering.connected = {0, 1, 2}
        roll.agreed = agreed | {"site-0": 10}
        roll.call(0.0)
        assert {site: one.node_id - FIRST_NODE_ID for site, one in roll.members.items()} == {
            "site-0": 0,
            "site-2": 2,
        }
        assert set(roll.absent) == {"site-1"}

    with_grid(body, sites)


def test_a_node_that_does_not_take_the_proxy_is_sent_it_only_so_often():
    sites = Sites()
    sites.broken = {1}

    def body(grid: Grid) -> None:
        roll = Roll(grid, PROXY, PLAN, AGREED)
        roll.call(5.0)
        for _ in range(5):
            roll.call(0.0)
            assert roll.absent == {"site-1": "did not take the proxy: refused: unavailable"}
        assert set(roll.members) == {"site-0", "site-2"}

    with_grid(body, sites)
    assert sites.of_kind("train.proxy").count(1) == MOST_DELIVERIES


def test_a_custodian_that_is_back_in_order_is_let_in():
    sites = Sites()
    sites.broken = {1}

    def body(grid: Grid) -> None:
        roll = Roll(grid, PROXY, PLAN, AGREED)
        roll.call(5.0)
        sites.broken = set()
        roll.call(0.0)
        assert set(roll.members) == set(AGREED) and not roll.absent

    with_grid(body, sites)


# ---- Plans and weights ----


def test_each_site_gets_the_plan_within_its_own_caps():
    sites = Sites()
    sites.caps = {0: (0.3, 200), 1: (5.0, 7), 2: (5e-324, 200)}
    asked = PLAN.model_copy(update={"delta": 1e-300})

    def body(grid: Grid) -> None:
        roll = Roll(grid, PROXY, asked, AGREED)
        roll.call(5.0)
        plans = {site: member.plan for site, member in roll.members.items()}
        assert plans == roll.plans
        assert plans == {"site-0": asked.within(0.3, 200), "site-1": asked.within(1.0, 7)}
        assert "there is no noise to be found" in roll.absent["site-2"]
        assert (
            plans["site-0"].noise_multiplier() > asked.noise_multiplier() > plans["site-1"].noise_multiplier()
        )

    with_grid(body, sites)


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    epsilons=st.lists(st.sampled_from([0.3, 0.5, 1.0]), min_size=5, max_size=5),
)
def test_the_noise_of_every_site_weighs_the_same_and_equal_budgets_count_by_size(sizes, epsilons):
    members = {
        str(k): Member(k, str(k), size, PLAN.within(epsilon, 20))
        for k, (size, epsilon) in enumerate(zip(sizes, epsilons, strict=False))
    }
    weights = weights_of(members)
    sigma = {site: member.plan.noise_multiplier() for site, member in members.items()}
    noise = [weights[site] * sigma[site] / member.declared_size for site, member in members.items()]
    np.testing.assert_allclose(noise, noise[0])
    for site, member in members.items():
        if sigma[site] == min(sigma.values()):
            assert weights[site] == member.declared_size
