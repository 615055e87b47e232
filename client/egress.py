"""The egress gate: the only door out of a site.

`release` builds the one thing that may leave after a task and `inspect` reads the finished bytes back as a
stranger would, so that a fault anywhere in the lesson cannot put anything else on the wire. Whatever
happened, the result has the fields and the types that the task calls for, and no byte beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.codec import CODECS
from common.messages import Release, Task


@dataclass(frozen=True)
class Opinion:
    """What a lesson leaves behind.

    Attributes:
        logits_PC: What the release carries: the student's logits on the task's cases, or their movement.
        bought: The noisy counts of the statistics that the plan buys in this round, by name.
        state: The student after the lesson, itself differentially private: its weights, and what the codec
            cut off.
    """

    logits_PC: NDArray[np.float32]
    bought: Mapping[str, tuple[int, ...]]
    state: bytes


def release(task: Task, opinion: Opinion, *, steps: int, head: bytes) -> bytes:
    """Quantise an opinion and write it down.

    Args:
        task: What was asked.
        opinion: What the student says.
        steps: Private steps taken: the plan's, or 0 where the budget was spent.
        head: The ledger's head, opaque to the coordinator.

    Returns:
        The release's bytes, inspected.
    """
    plan = task.plan
    scale, payload = CODECS[plan.codec].encode(_sound_logits(task, opinion.logits_PC))
    body = Release(
        task_digest=task.digest(),
        proxy_digest=bytes.fromhex(plan.proxy_digest),
        round=task.round,
        steps=steps,
        codec=plan.codec,
        scale=scale,
        payload=payload,
        cases=len(task.cases_P),
        classes=plan.classes,
        counts=_sound_counts(task, opinion.bought),
        head=head,
    ).encode()
    inspect(task, body)
    return body


def inspect(task: Task, body: bytes) -> None:
    """Read a release back and hold it against the task.

    Raises:
        ValueError: if it is not exactly what the task calls for; then it must not leave.
    """
    read = Release.decode(body)
    as_asked = (
        read.task_digest == task.digest()
        and read.proxy_digest == bytes.fromhex(task.plan.proxy_digest)
        and (read.round, read.cases, read.classes) == (task.round, len(task.cases_P), task.plan.classes)
        and read.codec == task.plan.codec
        and read.steps in (0, task.plan.steps_per_round)
        and len(read.counts) == sum(one.size for one in task.plan.purchases(task.round))
    )
    if not as_asked or not np.isfinite(read.logits()).all():
        raise ValueError("a release that does not fit its task was stopped at the gate")


def _sound_logits(task: Task, logits_PC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of the task's shape, zero where they are not finite or of another shape."""
    shape = (len(task.cases_P), task.plan.classes)
    if logits_PC.shape != shape:
        return np.zeros(shape, dtype=np.float32)
    return np.nan_to_num(logits_PC, nan=0.0, posinf=0.0, neginf=0.0)


def _sound_counts(task: Task, bought: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """As many counts as this round buys, each in the range of the wire."""
    counts: list[int] = []
    for one in task.plan.purchases(task.round):
        found = bought.get(one.name, ())
        counts += found if len(found) == one.size else [0] * one.size
    return tuple(min(max(count, -(2**31)), 2**31 - 1) for count in counts)
