"""Admission: whatever bytes come, a site can harm nothing but its own contribution."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from common.codec import CODECS
from common.config import RunConfig
from common.envelope import LEARN, seal
from common.messages import Refusal, Release, Rule, Task
from common.plan import Plan, plan_of
from server.admission import Admitted, Member, admit
from server.aggregation import Contribution

CASES, CLASSES = 6, 3


def plan(**changes) -> Plan:
    config = RunConfig.from_run_config({"method": "fedmd", **changes})
    return plan_of(config, study="s", proxy_digest=bytes(range(32)), classes=CLASSES)


def task(round_number: int = 1, **changes) -> Task:
    soft_PC = np.full((CASES, CLASSES), np.log(1 / CLASSES), dtype=np.float16)
    return Task(plan(**changes), round_number, np.arange(CASES, dtype=np.int32), soft_PC)


NORTH, SOUTH = Member(11, "north", 100, plan()), Member(12, "south", 300, plan())


def release(asked: Task, seed: int = 0, **changes) -> Release:
    logits_PC = np.random.default_rng(seed).normal(size=(CASES, CLASSES)).astype(np.float32)
    scale, payload = CODECS["int8"].encode(logits_PC)
    bought = sum(one.size for one in asked.plan.purchases(asked.round))
    said = Release(
        task_digest=asked.digest(),
        proxy_digest=bytes.fromhex(asked.plan.proxy_digest),
        round=asked.round,
        steps=1,
        codec="int8",
        scale=scale,
        payload=payload,
        cases=CASES,
        classes=CLASSES,
        counts=tuple(range(bought)),
        head=bytes([seed]) * 32,
    )
    return replace(said, **changes)


@pytest.fixture(scope="module", autouse=True)
def in_a_run() -> Iterator[None]:
    """Flower lets nobody make a message outside of a run."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    yield


def question(member: Member) -> Message:
    message = Message(seal(b""), member.node_id, LEARN)
    message.metadata.__dict__["_message_id"] = f"to {member.site}"
    return message


def answer(member: Member, body: bytes) -> Message:
    return Message(seal(body), reply_to=question(member))


def heard(
    asked: Task, *replies: Message, members: tuple[Member, ...] = (NORTH, SOUTH)
) -> tuple[Admitted, list[Contribution]]:
    by_id = {f"to {member.site}": member for member in members}
    contributions: list[Contribution] = []
    admitted = admit(replies, dict.fromkeys(by_id, asked), by_id, contributions.append)
    assert sorted(one.site for one in contributions) == list(admitted.answered)
    return admitted, contributions


def hold(asked: Task, *replies: Message) -> Admitted:
    return heard(asked, *replies)[0]


def test_a_sound_release_is_a_contribution_with_the_sites_declared_size():
    asked = task()
    said = release(asked, seed=1)
    replies = (answer(SOUTH, said.encode()), answer(NORTH, release(asked).encode()))
    admitted, (south, north) = heard(asked, *replies)
    assert admitted.answered == ("north", "south")
    assert (north.site, south.site, south.weight) == ("north", "south", 300)
    np.testing.assert_allclose(south.logits_PC, replace(said, scale=float(np.float32(said.scale))).logits())
    assert admitted.heads["south"] == said.head
    assert admitted.left_out == {} and admitted.idle == frozenset()
    assert admitted.payload_bytes["south"] == len(said.encode()) < admitted.wire_bytes["south"]


def test_who_does_not_answer_is_named():
    assert hold(task()).left_out == {"north": "no answer in time", "south": "no answer in time"}


def test_the_first_of_several_answers_stands():
    asked = task()
    said = [release(asked, seed) for seed in (0, 1, 2)]
    admitted, (north, _) = heard(
        asked, *(answer(NORTH, one.encode()) for one in said), answer(SOUTH, said[0].encode())
    )
    assert admitted.answered == ("north", "south") and admitted.left_out == {}
    np.testing.assert_allclose(north.logits_PC, said[0].logits(), rtol=1e-6)
    refused, _ = heard(asked, answer(NORTH, Refusal(Rule.BUDGET).encode()), answer(NORTH, said[0].encode()))
    assert refused.left_out["north"] == "refused: budget"


def test_an_answer_to_something_else_is_nobodys():
    asked, stray = task(), Member(13, "stray", 1, plan())
    admitted = hold(asked, answer(stray, release(asked).encode()), answer(NORTH, release(asked).encode()))
    assert admitted.answered == ("north",)
    assert admitted.left_out == {"south": "no answer in time"}


def test_a_site_without_private_steps_is_idle_and_not_in_the_ensemble():
    asked = task()
    admitted = hold(asked, answer(NORTH, release(asked, steps=0).encode()))
    assert admitted.idle == {"north"} and admitted.answered == ()
    assert "budget is spent" in admitted.left_out["north"]
    assert admitted.heads["north"] and admitted.payload_bytes["north"]


def test_what_was_bought_is_told_apart():
    asked = task(**{"aggregation.rule": "class-weighted", "num-rounds": 1, "privacy.hold-out-share": 0.1})
    admitted = hold(asked, answer(NORTH, release(asked, counts=(7, -1, 5, 30, 10)).encode()))
    assert admitted.histograms == {"north": (7, -1, 5)}
    assert admitted.hold_out == {"north": 0.75}
    for counts in ((), (7, -1, 5)):
        refused = hold(asked, answer(NORTH, release(asked, counts=counts).encode()))
        assert "statistics" in refused.left_out["north"]


def test_an_errors_text_is_not_repeated():
    failed = Message(Error(2, "patient 7 has a narrowing"), reply_to=question(NORTH))
    assert hold(task(), failed).left_out["north"] == "its client app failed (Flower's error code 2)"


def test_a_refusal_is_named_by_its_rule():
    refusal = answer(NORTH, Refusal(Rule.BUDGET).encode())
    assert hold(task(), refusal).left_out["north"] == "refused: budget"


@given(data=st.data(), body=st.one_of(st.binary(max_size=300), st.just(None)))
def test_mangled_bytes_cost_the_site_that_sent_them_and_nobody_else(data, body):
    asked = task()
    hostile = bytearray(release(asked).encode() if body is None else body)
    for _ in range(data.draw(st.integers(1, 4))):
        if hostile:
            hostile[data.draw(st.integers(0, len(hostile) - 1))] = data.draw(st.integers(0, 255))
    _, (alone,) = heard(asked, answer(SOUTH, release(asked, 1).encode()), members=(SOUTH,))
    replies = (answer(NORTH, bytes(hostile)), answer(SOUTH, release(asked, 1).encode()))
    admitted, contributions = heard(asked, *replies)
    south = contributions[-1]
    assert south.site == "south" and (south.logits_PC == alone.logits_PC).all()
    if len(contributions) == 2:  # only what a site may say could be changed: payload, scale, head
        assert np.isfinite(contributions[0].logits_PC).all()
    else:
        assert admitted.left_out["north"]
