"""The egress gate: the only door out of a site.

`release` builds the one thing that may leave after a task and `inspect` reads the finished bytes back as a stranger would, so that a fault anywhere
in the lesson cannot put anything else on the wire. Whatever happened, the result has the fields, the types and the exact length that the task calls for.
"""

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
        histogram_C: The noisy label histogram, if the plan buys one.
        state: The student's weights after the lesson, themselves differentially private.
    """

    logits_PC: NDArray[np.float32]
    histogram_C: tuple[int, ...]
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
    scale, payload = CODECS[plan.codec].encode(opinion.logits_PC)
    bought = plan.histogram_share > 0 and task.round == 1
    histogram_C = opinion.histogram_C if len(opinion.histogram_C) == plan.classes else (0,) * plan.classes
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
        histogram_C=histogram_C if bought else (),
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
    )
    if not as_asked or not np.isfinite(read.logits()).all():
        raise ValueError("a release that does not fit its task was stopped at the gate")
