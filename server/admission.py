"""Admission: what a site sends is hostile input until it has been held against the task.

A reply that is broken, late, doubled or about something else costs its own contribution and nothing more;
the round goes on with the rest, and the reason is kept by name. A site's texts are never shown: reasons are
ours.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto

from common.envelope import unseal
from common.messages import Answer, MessageError, Refusal, Release, Rule, Task, decode_answer
from common.plan import HOLD_OUT_ACCURACY, LABEL_HISTOGRAM, Plan
from server.aggregation import Contribution


@dataclass(frozen=True)
class Member:
    """A site as the coordinator knows it, and the run's plan within that site's own caps."""

    node_id: int
    site: str
    declared_size: int
    plan: Plan


@dataclass(frozen=True)
class Admitted:
    """A round's answers after admission.

    Attributes:
        answered: Sites that the ensemble is made of, in order of their names.
        left_out: Why the others are not in it.
        idle: Sites that answered without private steps. Any other may have charged its budget, also one
            that didn't answer.
        heads: Each answering site's ledger head, which the next task brings back.
        histograms: Each site's noisy label histogram, where this round bought it.
        hold_out: Noisy accuracy of each site's student on patients it held out, where this round bought it.
        payload_bytes, wire_bytes: Size of each answering site's release body, and of its whole serialised
            message.
        unanswered: The messages whose task nobody answered in time, each with its site.
    """

    answered: tuple[str, ...]
    left_out: Mapping[str, str]
    idle: frozenset[str]
    heads: Mapping[str, bytes]
    histograms: Mapping[str, tuple[int, ...]]
    hold_out: Mapping[str, float]
    payload_bytes: Mapping[str, int]
    wire_bytes: Mapping[str, int]
    unanswered: Mapping[str, str] = field(default_factory=dict)


class NotAdmitted(ValueError):
    """A reply that does not answer the task; its text is the reason."""


REFUSED = "refused: "
"""Before the rule, in a reason."""
FOREIGN_NODE = "foreign-node"
"""The one rule of the coordinator's own: a site's name from a node that isn't the site's."""
RULES = {FOREIGN_NODE, *(rule.label for rule in Rule)}


GONE = "its node is gone"
AWAY = {ErrorCode.NODE_UNAVAILABLE: GONE, ErrorCode.CLIENT_APP_CRASHED: "its client app was killed"}
"""By Flower's error codes: why a site doesn't answer that may be back in a minute."""


def rule_in(reason: str) -> str | None:
    """The name of the rule by which a site refused or was refused, from the reason it was left out for."""
    words = reason.partition(REFUSED)[2].split(":")[0]
    return words if words in RULES else None


def admit(
    replies: Iterable[Message],
    asked: Mapping[str, Task],
    members: Mapping[str, Member],
    hear: Callable[[Contribution], None],
) -> Admitted:
    """Sort a round's replies into contributions and reasons, and let go of each before the next is taken.

    Args:
        replies: Flower's replies, in any order.
        asked: The task that each site was sent, by the id of the message that carried it.
        members: The site behind each message id.
        hear: Takes each contribution as it comes.
    """
    answered: set[str] = set()
    histograms: dict[str, tuple[int, ...]] = {}
    left_out: dict[str, str] = {}
    idle: set[str] = set()
    heads: dict[str, bytes] = {}
    hold_out: dict[str, float] = {}
    payload: dict[str, int] = {}
    wire: dict[str, int] = {}
    for reply in replies:
        message_id = reply.metadata.reply_to_message_id
        if message_id not in members:
            continue  # an answer to something that this round did not ask
        member = members[message_id]
        if member.site in answered or member.site in left_out:
            continue  # it has answered: the first answer stands
        try:
            release = release_in(reply, asked[message_id])
        except NotAdmitted as reason:
            left_out[member.site] = str(reason)
            continue
        heads[member.site] = release.head
        payload[member.site] = len(release.encode())
        wire[member.site] = message_to_proto(reply).ByteSize()
        if release.steps == 0:
            left_out[member.site] = "its budget is spent: it learns and answers, without private steps"
            idle.add(member.site)
            continue
        bought = bought_in(release, asked[message_id])
        answered.add(member.site)
        histogram_C = bought.get(LABEL_HISTOGRAM, ())
        if histogram_C:
            histograms[member.site] = histogram_C
        hear(Contribution(member.site, release.logits(), member.declared_size, histogram_C))
        if HOLD_OUT_ACCURACY in bought:
            right, wrong = (max(count, 0) for count in bought[HOLD_OUT_ACCURACY])
            hold_out[member.site] = right / max(right + wrong, 1)
    for member in members.values():
        if member.site not in answered:
            left_out.setdefault(member.site, "no answer in time")
    reasons = {site: left_out[site] for site in sorted(left_out)}
    return Admitted(
        tuple(sorted(answered)), reasons, frozenset(idle), heads, histograms, hold_out, payload, wire
    )


def bought_in(release: Release, task: Task) -> dict[str, tuple[int, ...]]:
    """Deal a release's counts out to the statistics that its round bought, by name."""
    bought, start = {}, 0
    for one in task.plan.purchases(task.round):
        bought[one.name] = release.counts[start : start + one.size]
        start += one.size
    return bought


def answer_in(reply: Message) -> Answer:
    """Read whatever a site answered; raises `NotAdmitted`."""
    if reply.has_error():
        # The text of the error comes from the site's process: its code is enough.
        code = reply.error.code
        raise NotAdmitted(AWAY.get(code, f"its client app failed (Flower's error code {code})"))
    try:
        answer = decode_answer(unseal(reply.content))
    except MessageError as error:
        raise NotAdmitted(f"a malformed answer: {error}") from None
    if isinstance(answer, Refusal):
        raise NotAdmitted(f"{REFUSED}{answer}")
    return answer


def release_in(reply: Message, task: Task) -> Release:
    """Read a release and hold it against the task that it should answer; raises `NotAdmitted`."""
    release = answer_in(reply)
    if not isinstance(release, Release):
        raise NotAdmitted("an answer of another kind than a release")
    plan = task.plan
    expected_counts = sum(one.size for one in plan.purchases(task.round))
    checks = (
        (release.round == task.round, f"of round {release.round}, while round {task.round} is open"),
        (release.task_digest == task.digest(), "about another task"),
        (release.proxy_digest == bytes.fromhex(plan.proxy_digest), "about another proxy"),
        (release.cases == len(task.cases_P) and release.classes == plan.classes, "of another shape"),
        (release.codec == plan.codec, "in another codec"),
        (release.steps in (0, plan.steps_per_round), "with another number of private steps"),
        (
            len(release.counts) == expected_counts,
            "with statistics that nobody asked for, or without those bought",
        ),
    )
    for holds, complaint in checks:
        if not holds:
            raise NotAdmitted(f"a release {complaint}")
    try:
        finite = bool(np.isfinite(release.logits()).all())
    except MessageError as error:
        raise NotAdmitted(f"a malformed release: {error}") from None
    if not finite:
        raise NotAdmitted("a release with values that are not finite")
    return release
