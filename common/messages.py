"""The protocol: what a coordinator asks, what a site answers, byte for byte.

Six bodies travel, each inside one Flower message in an envelope with no other field (`common.envelope`):

| body | from | holds |
|---|---|---|
| `Offer` | server | digest of the proxy this run uses |
| `Greeting` | site | its name, its declared size, its caps on one run, whether it knows that proxy |
| `Task` | server | the plan, the round, which proxy cases, the teacher's soft labels on them |
| `Release` | site | quantised logits (or their movement) on them: *all that is learned from patients* |
| `Refusal` | site | the name of a rule, the digests needed to see why |
| `Receipt` | site | digest of what was received (a proxy, a final student) |

The proxy and the final student travel as their own files' bytes. A `Release` has a header of fixed length
and a payload whose length follows from the task and, where it is entropy-coded, from the logits that it
holds: the size of an answer says nothing that the answer doesn't.
Decoders treat what they read as hostile: bounded sizes, exact lengths, known codes, finite numbers; they
raise `MessageError` and nothing else.
"""

import hashlib
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.codec import BY_NUMBER, CODECS, CodecError
from common.entropy import MOST_SYMBOLS

if TYPE_CHECKING:  # whoever reads answers only, as a courier does, starts faster without
    from common.plan import Plan

MOST_CASES = 1_000_000
MOST_VALUES = MOST_SYMBOLS
"""Bounds on cases and on cases × classes of one message: hostile sizes are refused before memory is taken."""

NO_HEAD = bytes(32)


class MessageError(ValueError):
    """The bytes are not a well-formed message of this protocol."""


class Rule(IntEnum):
    """Why a site refuses; the name is all that a coordinator learns."""

    MALFORMED = 1
    UNKNOWN_PROXY = 2
    ROUND_CONFLICT = 3
    PLAN_CONFLICT = 4
    NOT_ALLOWED = 5
    NOT_APPROVED = 6
    TOO_MANY_ATTEMPTS = 7
    UNKNOWN_HEAD = 8
    UNAVAILABLE = 9
    BUDGET = 10

    @property
    def label(self) -> str:
        """The rule's name as people read it."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Offer:
    """Which proxy set the run will speak about."""

    proxy_digest: bytes

    def encode(self) -> bytes:
        """Write the offer down."""
        return b"GRO1" + self.proxy_digest

    @classmethod
    def decode(cls, body: bytes) -> "Offer":
        """Read an offer; raises `MessageError`."""
        _expect(len(body) == 36 and body[:4] == b"GRO1", "not an offer")
        return cls(body[4:])


@dataclass(frozen=True)
class Greeting:
    """A site introduces itself.

    Attributes:
        site: Its name.
        declared_size: The one public size that its policy declares: denominator of its steps and weight in
            the ensemble.
        most_epsilon: Its policy's cap on the ε of one run; a plan that costs more is drawn up anew within it.
        most_rounds: Its policy's cap on the rounds of one run, likewise.
        knows_proxy: Whether it has the offered proxy.
    """

    site: str
    declared_size: int
    most_epsilon: float
    most_rounds: int
    knows_proxy: bool

    def encode(self) -> bytes:
        """Write the greeting down, in a fixed length."""
        return _GREETING.pack(
            b"GRG2",
            self.site.encode(),
            self.declared_size,
            self.most_epsilon,
            self.most_rounds,
            self.knows_proxy,
        )

    @classmethod
    def decode(cls, body: bytes) -> "Greeting":
        """Read a greeting; raises `MessageError`."""
        _expect(len(body) == _GREETING.size and body[:4] == b"GRG2", "not a greeting")
        _, name, declared_size, most_epsilon, most_rounds, knows_proxy = _GREETING.unpack(body)
        site = name.rstrip(b"\0").decode("ascii", errors="replace")
        _expect(
            re.fullmatch(r"[A-Za-z0-9._-]+", site) is not None,
            "a site's name has other than letters, digits, . _ -",
        )
        _expect(declared_size >= 1, "a declared size of 0")
        _expect(math.isfinite(most_epsilon) and most_epsilon > 0, "a cap on ε that is no positive number")
        _expect(most_rounds >= 1, "a cap of 0 rounds")
        return cls(site, declared_size, most_epsilon, most_rounds, bool(knows_proxy))


@dataclass(frozen=True)
class Task:
    """One round's question to a site.

    Attributes:
        plan: The run's plan.
        round: From 1 to `plan.rounds`.
        cases_P: Rows of the proxy this round speaks about, ascending.
        log_soft_labels_PC: The teacher's log soft labels at the student's temperature, float16.
        head: Head of the site's ledger that its last release of this run carried, or zeros.
    """

    plan: "Plan"
    round: int
    cases_P: NDArray[np.int32]
    log_soft_labels_PC: NDArray[np.float16]
    head: bytes = NO_HEAD

    def encode(self) -> bytes:
        """Write the task down in its canonical form."""
        plan = self.plan.canonical()
        return b"".join(
            (
                _TASK.pack(b"GRT1", self.round, len(self.cases_P), self.plan.classes, self.head, len(plan)),
                plan,
                np.ascontiguousarray(self.cases_P, dtype="<i4").tobytes(),
                np.ascontiguousarray(self.log_soft_labels_PC, dtype="<f2").tobytes(),
            )
        )

    def digest(self) -> bytes:
        """SHA-256 of the canonical form without the head, since one round asks one thing."""
        return hashlib.sha256(replace(self, head=NO_HEAD).encode()).digest()

    @classmethod
    def decode(cls, body: bytes) -> "Task":
        """Read a task.

        Raises:
            MessageError: if anything about the bytes is not as `encode` writes it.
        """
        from common.plan import Plan

        _expect(len(body) >= _TASK.size, "too short for a task")
        magic, round_number, cases, classes, head, plan_length = _TASK.unpack_from(body)
        _expect(magic == b"GRT1", "not a task")
        _expect(1 <= cases <= MOST_CASES and cases * classes <= MOST_VALUES, "too many cases")
        _expect(
            len(body) == _TASK.size + plan_length + 4 * cases + 2 * cases * classes,
            "a length that does not fit",
        )
        plan_bytes = body[_TASK.size : _TASK.size + plan_length]
        try:
            plan = Plan.model_validate_json(plan_bytes)
        except ValueError:
            raise MessageError("the plan is not valid") from None
        _expect(plan.canonical() == plan_bytes, "the plan is not in canonical form")
        _expect(
            plan.classes == classes and 1 <= round_number <= plan.rounds,
            "classes or round do not fit the plan",
        )
        cases_P = np.frombuffer(body, "<i4", cases, _TASK.size + plan_length)
        _expect(
            bool((cases_P >= 0).all() and (np.diff(cases_P) > 0).all()), "cases are not ascending row numbers"
        )
        labels = np.frombuffer(body, "<f2", cases * classes, len(body) - 2 * cases * classes)
        log_soft_labels_PC = labels.reshape(cases, classes)
        _expect(bool(np.isfinite(log_soft_labels_PC).all()), "a soft label is not finite")
        total_P = np.exp(log_soft_labels_PC.astype(np.float64)).sum(axis=1)
        _expect(bool((np.abs(total_P - 1) < 0.05).all()), "soft labels do not add up to 1")
        return cls(plan, round_number, cases_P, log_soft_labels_PC, head)


@dataclass(frozen=True)
class Release:
    """What a site's student thinks of the public cases.

    Attributes:
        task_digest: Digest of the task it answers.
        proxy_digest: Digest of the proxy the site used.
        round: The task's round.
        steps: Private steps taken: the plan's number, or 0 where the budget was spent (nothing of the data
            shows in it).
        codec: Name of the codec.
        scale: Size of one quantisation step.
        payload: The quantised values.
        cases: Number of proxy cases.
        classes: Number of classes.
        counts: What this round buys (`Plan.purchases`), noisy counts one after another; mostly empty.
        head: Head of the site's ledger as the task was charged: opaque to the coordinator.
    """

    task_digest: bytes
    proxy_digest: bytes
    round: int
    steps: int
    codec: str
    scale: float
    payload: bytes
    cases: int
    classes: int
    counts: tuple[int, ...] = ()
    head: bytes = NO_HEAD

    def encode(self) -> bytes:
        """Write the release down."""
        header = _RELEASE.pack(
            b"GRR1",
            CODECS[self.codec].number,
            self.round,
            self.steps,
            self.cases,
            self.classes,
            len(self.counts),
            self.scale,
            self.task_digest,
            self.proxy_digest,
            self.head,
        )
        return header + struct.pack(f"<{len(self.counts)}i", *self.counts) + self.payload

    def logits(self) -> NDArray[np.float32]:
        """Dequantise to `logits_NC`; raises `MessageError`."""
        try:
            return CODECS[self.codec].decode(self.payload, self.scale, self.cases, self.classes)
        except CodecError as error:
            raise MessageError(str(error)) from None

    @classmethod
    def decode(cls, body: bytes) -> "Release":
        """Read a release; raises `MessageError`."""
        _expect(len(body) >= _RELEASE.size, "too short for a release")
        magic, codec, round_number, steps, cases, classes, bought, scale, task, proxy, head = (
            _RELEASE.unpack_from(body)
        )
        _expect(magic == b"GRR1" and codec in BY_NUMBER, "not a release")
        _expect(1 <= cases <= MOST_CASES and cases * classes <= MOST_VALUES, "too many cases")
        _expect(classes >= 2, "too few classes")
        _expect(bought <= classes + 2, "more counts than a plan can buy")
        payload_start = _RELEASE.size + 4 * bought
        longest = BY_NUMBER[codec].longest(cases, classes)
        _expect(payload_start <= len(body) <= payload_start + longest, "a length that does not fit")
        counts = struct.unpack_from(f"<{bought}i", body, _RELEASE.size)
        return cls(
            task_digest=task,
            proxy_digest=proxy,
            round=round_number,
            steps=steps,
            codec=BY_NUMBER[codec].name,
            scale=scale,
            payload=body[payload_start:],
            cases=cases,
            classes=classes,
            counts=counts,
            head=head,
        )


@dataclass(frozen=True)
class Refusal:
    """A site says no.

    Attributes:
        rule: The rule that refuses.
        asked: Digest the coordinator's request was about (task, plan or proxy), or zeros.
        known: For `UNKNOWN_PROXY`, the digest of the proxy the site has for this study, or zeros.
    """

    rule: Rule
    asked: bytes = bytes(32)
    known: bytes = bytes(32)

    def encode(self) -> bytes:
        """Write the refusal down."""
        return _REFUSAL.pack(b"GRX1", self.rule, self.asked, self.known)

    def __str__(self) -> str:
        """Say the rule, and both digests where a proxy differs."""
        if self.rule is Rule.UNKNOWN_PROXY:
            asked, known = self.asked.hex()[:16], self.known.hex()[:16]
            return f"{self.rule.label}: asked for {asked}…, the site has {known}…"
        return self.rule.label

    @classmethod
    def decode(cls, body: bytes) -> "Refusal":
        """Read a refusal; raises `MessageError`."""
        _expect(len(body) == _REFUSAL.size and body[:4] == b"GRX1", "not a refusal")
        _, rule, asked, known = _REFUSAL.unpack(body)
        _expect(rule in {known_rule.value for known_rule in Rule}, "an unknown rule")
        return cls(Rule(rule), asked, known)


@dataclass(frozen=True)
class Receipt:
    """A site has what it was sent."""

    digest: bytes

    def encode(self) -> bytes:
        """Write the receipt down."""
        return b"GRA1" + self.digest

    @classmethod
    def decode(cls, body: bytes) -> "Receipt":
        """Read a receipt; raises `MessageError`."""
        _expect(len(body) == 36 and body[:4] == b"GRA1", "not a receipt")
        return cls(body[4:])


Answer = Greeting | Release | Refusal | Receipt

_GREETING = struct.Struct("<4s64sIdI?")
_TASK = struct.Struct("<4sIIH32sI")
_RELEASE = struct.Struct("<4sBIIIHHf32s32s32s")
_REFUSAL = struct.Struct("<4sB32s32s")
_ANSWERS: dict[bytes, Callable[[bytes], Answer]] = {
    b"GRG2": Greeting.decode,
    b"GRR1": Release.decode,
    b"GRX1": Refusal.decode,
    b"GRA1": Receipt.decode,
}


def decode_answer(body: bytes) -> Answer:
    """Read whatever a site may answer; raises `MessageError`."""
    decode = _ANSWERS.get(body[:4])
    if decode is None:
        raise MessageError("not an answer of this protocol")
    return decode(body)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise MessageError(otherwise)
