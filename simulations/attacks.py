"""Hostile sites for simulations: what a site sends that wants the ensemble to fail.

A hostile site holds everything that an honest one holds: the task with its soft labels, the public cases, and
a release of its own. It does its honest lesson, and then sends other values in an envelope that is right in
every field, so nothing but the ensemble can tell it from the others. The custodian and the courier of
`client/` know nothing of it: the attack sits around the ClientApp, where a courier could be replaced.

| attack | values sent | size |
|---|---|---|
| `least-likely` | one-hots of the class that the soft labels think least of | as loud as the codec allows |
| `flip` | its honest values with the other sign | its honest ones' |
| `flip-loud` | the same | a hundred times its honest ones' |
| `constant` | one class for every case | as loud as the codec allows |
| `random` | Gaussian | as loud as the codec allows |
| `collude` | from the likeliest class to the next, the same from all and always | its honest ones' |
| `late` | its honest values in the first half of the run, then those of `collude` | its honest ones' |

`collude` is the quiet one: no value stands out, hostile sites agree with each other more than honest ones do,
and server momentum adds their rounds up. `late` has earned what trust there is before it turns.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from common import seeds
from common.codec import CODECS, LARGEST_LOGIT, centred
from common.envelope import LEARN, seal, unseal
from common.messages import Release, Task, decode_answer

Floats = NDArray[np.float32]

LOUDER = 100.0

Attack = Callable[[Task, Floats, int], Floats]
"""From the task, the honest `logits_PC` and the site's place to the values that are sent instead."""


class InfiltratedApp(ClientApp):
    """A ClientApp that some nodes have replaced.

    Args:
        honest: The app that all nodes would run.
        attack: What the hostile ones send.
        hostile: Their places (`partition-id`).
    """

    def __init__(self, honest: ClientApp, attack: Attack, hostile: Collection[int]) -> None:
        """Remember who is hostile."""
        super().__init__()
        self._honest, self._attack, self._hostile = honest, attack, frozenset(hostile)

    def __call__(self, message: Message, context: Context) -> Message:
        """Handle a message as the node's app does."""
        reply = self._honest(message, context)
        place = int(context.node_config["partition-id"])
        if place not in self._hostile or message.metadata.message_type != LEARN:
            return reply
        said = decode_answer(unseal(reply.content))
        if not isinstance(said, Release):
            return reply
        task = Task.decode(unseal(message.content))
        values_PC = self._attack(task, said.logits(), place)
        scale, payload = CODECS[said.codec].encode(values_PC)
        forged = replace(said, scale=scale, payload=payload)
        return Message(seal(forged.encode()), reply_to=message)


def _least_likely(task: Task, honest_PC: Floats, place: int) -> Floats:
    del place
    return LARGEST_LOGIT * _one_hot(task.log_soft_labels_PC.argmin(axis=1), honest_PC.shape[1])


def _flip(task: Task, honest_PC: Floats, place: int) -> Floats:
    del task, place
    return -honest_PC


def _flip_loud(task: Task, honest_PC: Floats, place: int) -> Floats:
    del task, place
    return -LOUDER * honest_PC


def _constant(task: Task, honest_PC: Floats, place: int) -> Floats:
    del task, place
    return LARGEST_LOGIT * _one_hot(np.zeros(len(honest_PC), dtype=np.int64), honest_PC.shape[1])


def _random(task: Task, honest_PC: Floats, place: int) -> Floats:
    noise_PC = seeds.generator(task.plan.seed, "attack", place, task.round).standard_normal(honest_PC.shape)
    return np.asarray(LARGEST_LOGIT / 4 * noise_PC, dtype=np.float32)


def _collude(task: Task, honest_PC: Floats, place: int) -> Floats:
    del place
    classes = honest_PC.shape[1]
    likeliest_P = task.log_soft_labels_PC.argmax(axis=1)
    wrong_PC = _one_hot((likeliest_P + 1) % classes, classes)
    if task.plan.returns == "movement":
        wrong_PC -= _one_hot(likeliest_P, classes)
    wrong_PC = centred(wrong_PC)
    return wrong_PC * np.float32(np.linalg.norm(honest_PC) / np.linalg.norm(wrong_PC))


def _late(task: Task, honest_PC: Floats, place: int) -> Floats:
    return honest_PC if task.round <= task.plan.rounds // 2 else _collude(task, honest_PC, place)


def _one_hot(class_P: NDArray[np.integer], classes: int) -> Floats:
    one_hot_PC: Floats = np.eye(classes, dtype=np.float32)[class_P]
    return one_hot_PC


ATTACKS: dict[str, Attack] = {
    "least-likely": _least_likely,
    "flip": _flip,
    "flip-loud": _flip_loud,
    "constant": _constant,
    "random": _random,
    "collude": _collude,
    "late": _late,
}
