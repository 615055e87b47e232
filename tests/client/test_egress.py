"""The gate: what comes out fits the task, and nothing beside it, whatever a lesson left behind."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from client.egress import Opinion, inspect, release
from common.codec import CODECS, LARGEST_LOGIT
from common.config import RunConfig
from common.messages import Release, Task
from common.plan import HOLD_OUT_ACCURACY, LABEL_HISTOGRAM, plan_of

CASES, CLASSES = 5, 3
CONFIGS = {
    "descent": {},
    "oneshot": {"method": "oneshot"},
    "both": {"method": "oneshot", "privacy.hold-out-share": 0.1},
    "hold-out": {"privacy.hold-out-share": 0.1, "num-rounds": 1},
}


def task(name: str = "descent", codec: str = "int8") -> Task:
    config = RunConfig.from_run_config({**CONFIGS[name], "codec": codec})
    plan = plan_of(config, study="s", proxy_digest=bytes(range(32)), classes=CLASSES)
    soft_PC = np.full((CASES, CLASSES), np.log(1 / CLASSES), dtype=np.float16)
    return Task(plan, 1, np.arange(CASES, dtype=np.int32), soft_PC)


def opinion(logits_PC=None, **bought: tuple[int, ...]) -> Opinion:
    logits_PC = np.ones((CASES, CLASSES), dtype=np.float32) if logits_PC is None else logits_PC
    return Opinion(logits_PC, {name.replace("_", "-"): counts for name, counts in bought.items()}, b"")


anything = arrays(
    np.float32,
    st.one_of(st.just((CASES, CLASSES)), array_shapes(max_dims=3, max_side=6)),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)
counts = st.lists(st.integers(-(2**70), 2**70), max_size=6).map(tuple)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("codec", CODECS)
@given(logits=anything, histogram=counts, accuracy=counts, steps=st.booleans())
def test_whatever_a_lesson_leaves_a_fitting_release_comes_out(
    name, codec, logits, histogram, accuracy, steps
):
    asked = task(name, codec)
    said = opinion(logits, label_histogram=histogram, hold_out_accuracy=accuracy)
    taken = asked.plan.steps_per_round if steps else 0
    body = release(asked, said, steps=taken, head=bytes(32))
    read = Release.decode(body)
    other = Release.decode(release(asked, opinion(), steps=0, head=bytes([9]) * 32))
    assert len(body) - len(read.payload) == len(other.encode()) - len(other.payload)
    assert len(read.payload) <= CODECS[codec].longest(CASES, CLASSES)
    assert np.isfinite(read.logits()).all()
    assert np.linalg.norm(read.logits(), axis=1).max() <= LARGEST_LOGIT * CLASSES**0.5 * 1.01
    assert read.task_digest == asked.digest() and read.steps == taken


def test_what_was_bought_leaves_in_the_order_of_the_plan_and_nothing_else_does():
    said = opinion(hold_out_accuracy=(8, 2), label_histogram=(5, 6, 7), something_else=(1, 2, 3))
    assert [one.name for one in task("both").plan.purchases(1)] == [LABEL_HISTOGRAM, HOLD_OUT_ACCURACY]
    assert Release.decode(release(task("both"), said, steps=20, head=bytes(32))).counts == (5, 6, 7, 8, 2)
    assert Release.decode(release(task("hold-out"), said, steps=1, head=bytes(32))).counts == (8, 2)
    assert Release.decode(release(task(), said, steps=1, head=bytes(32))).counts == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"task_digest": bytes(32)},
        {"proxy_digest": bytes(32)},
        {"round": 2},
        {"steps": 7},
        {"counts": (1,)},
        {"cases": 15, "classes": 1},
        {"codec": "fp16", "payload": bytes(30)},
        {"scale": float("nan")},
        {"scale": 1e30},
    ],
)
def test_a_release_that_does_not_fit_is_stopped(changes):
    asked = task()
    sound = Release.decode(
        release(asked, opinion(np.eye(CASES, CLASSES, dtype=np.float32)), steps=1, head=bytes(32))
    )
    inspect(asked, sound.encode())
    with pytest.raises(ValueError):
        inspect(asked, replace(sound, **changes).encode())
    with pytest.raises(ValueError):
        inspect(asked, sound.encode() + b"\0")
