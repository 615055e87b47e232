"""The protocol: round trips, lengths, and hostile bytes that raise `MessageError` and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codec import CODECS
from common.config import RunConfig
from common.messages import (
    Greeting,
    MessageError,
    Offer,
    Receipt,
    Refusal,
    Release,
    Rule,
    Task,
    decode_answer,
)
from common.plan import plan_of

PLAN = plan_of(RunConfig(), study="s", proxy_digest=bytes(32), classes=3)


def task(cases: int = 4, seed: int = 0, **changes) -> Task:
    logits = np.random.default_rng(seed).normal(size=(cases, 3))
    log_soft = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return replace(Task(PLAN, 1, np.arange(cases, dtype=np.int32), log_soft.astype(np.float16)), **changes)


def release(cases: int = 4, codec: str = "int8", seed: int = 0, **changes) -> Release:
    scale, payload = CODECS[codec].encode(
        np.random.default_rng(seed).normal(size=(cases, 3)).astype(np.float32)
    )
    return replace(Release(bytes(32), bytes(32), 1, 1, codec, scale, payload, cases, 3), **changes)


@settings(deadline=None)
@given(cases=st.integers(1, 30), seed=st.integers(0, 99), head=st.binary(min_size=32, max_size=32))
def test_a_task_reads_back_as_written(cases, seed, head):
    asked = task(cases, seed, head=head)
    read = Task.decode(asked.encode())
    assert (read.plan, read.round, read.head) == (asked.plan, asked.round, asked.head)
    assert (read.cases_P == asked.cases_P).all()
    assert (read.log_soft_labels_PC == asked.log_soft_labels_PC).all()
    assert read.digest() == asked.digest()


def test_the_digest_covers_everything_but_the_head():
    asked = task()
    assert replace(asked, head=bytes([1]) * 32).digest() == asked.digest()
    others = [
        task(seed=1),
        task(cases=5),
        replace(asked, round=2),
        replace(asked, plan=PLAN.model_copy(update={"clipping_norm": 0.123})),
        replace(asked, cases_P=asked.cases_P + 1),
    ]
    assert len({asked.digest(), *(other.digest() for other in others)}) == 6


@given(
    cases=st.integers(1, 30),
    codec=st.sampled_from(sorted(CODECS)),
    seed=st.integers(0, 99),
    bought=st.booleans(),
)
def test_a_release_reads_back_as_written(cases, codec, seed, bought):
    said = release(cases, codec, seed, counts=(1, -2, 3) if bought else ())
    read = decode_answer(said.encode())
    assert isinstance(read, Release)
    assert replace(read, scale=0.0) == replace(said, scale=0.0)
    assert read.scale == pytest.approx(said.scale)


@given(codec=st.sampled_from(sorted(CODECS)), first=st.integers(0, 99), second=st.integers(0, 99))
def test_all_but_the_payload_has_one_length(codec, first, second):
    said = [release(codec=codec, seed=seed) for seed in (first, second)]
    assert len({len(one.encode()) - len(one.payload) for one in said}) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Greeting("st-elsewhere", 120, 0.3, 40, True),
        Refusal(Rule.UNKNOWN_PROXY, bytes([1]) * 32, bytes([2]) * 32),
        Receipt(bytes(32)),
    ],
)
def test_other_answers_read_back_as_written(answer):
    assert decode_answer(answer.encode()) == answer


def test_a_refused_proxy_shows_both_digests():
    shown = str(Refusal(Rule.UNKNOWN_PROXY, bytes([0xAB]) * 32, bytes([0xCD]) * 32))
    assert "abab" in shown and "cdcd" in shown


READERS = [Task.decode, decode_answer, Offer.decode]
WRITTEN = [
    task().encode(),
    release().encode(),
    release(counts=(1, 2, 3)).encode(),
    Greeting("a", 1, 1.0, 1, False).encode(),
    Refusal(Rule.BUDGET).encode(),
    Offer(bytes(32)).encode(),
]


@settings(deadline=None, max_examples=300)
@given(body=st.one_of(st.binary(max_size=400), st.sampled_from(WRITTEN)), data=st.data())
def test_hostile_bytes_raise_message_error_and_nothing_else(body, data):
    hostile = bytearray(body)
    for _ in range(data.draw(st.integers(0, 4))):
        if hostile:
            hostile[data.draw(st.integers(0, len(hostile) - 1))] = data.draw(st.integers(0, 255))
    hostile = hostile[: data.draw(st.integers(0, len(hostile)))] if data.draw(st.booleans()) else hostile
    for reader in READERS:
        try:
            read = reader(bytes(hostile))
            if isinstance(read, Release):
                assert np.isfinite(read.logits()).all()
        except MessageError:
            continue


def test_claims_of_huge_sizes_are_refused_before_memory_is_taken():
    body = bytearray(release().encode())
    body[13:17] = (2**31).to_bytes(4, "little")  # the header's number of cases
    with pytest.raises(MessageError):
        Release.decode(bytes(body))


def test_soft_labels_must_be_finite_and_add_up():
    for labels in (np.full((4, 3), np.nan), np.zeros((4, 3)), np.full((4, 3), -np.inf)):
        with pytest.raises(MessageError):
            Task.decode(task(log_soft_labels_PC=labels.astype(np.float16)).encode())
