"""What the ledger's entries mean: five kinds, and the state that follows from them.

| entry | says |
|---|---|
| `begin` | whose records: the data source, and what one unit of privacy is |
| `approve` | a person agreed to this plan of this study, having read this quote |
| `reserve` | this plan of this study, all of its events, under these caps |
| `charge` | one attempt at a task is about to read records: study, round, digest of the task, its events |
| `commit` | the task is done; attached are the release and, if there is a new one, the student's state |

The entries are the truth, and `State` only a fold over them in their order: every process computes the same.
A kind that this version does not know is refused rather than skipped, since it might be spending.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from client.chain import Entry
from common.accounting import Tally, Unit, from_json, tally, to_json, untally
from common.errors import ConfigError, UserError
from common.messages import Rule


class Refused(Exception):
    """The ledger says no.

    Attributes:
        rule: What a coordinator may learn.
        detail: Why, with numbers, for the site's own log; it is also the exception's text.
    """

    def __init__(self, rule: Rule, detail: str) -> None:
        """Say which rule refuses, and why."""
        self.rule, self.detail = rule, detail
        super().__init__(f"{rule.label}: {detail}")


@dataclass(frozen=True)
class Budget:
    """The policy's caps on ε, all at one δ, and on repetition.

    Attributes:
        delta: The δ of every cap.
        lifetime_epsilon: For everything that is ever done to the data source.
        study_epsilon: For one study, repeated tasks included.
        run_epsilon: For one plan, repeated tasks included.
        attempts: How often one task may be charged.
    """

    delta: float
    lifetime_epsilon: float
    study_epsilon: float
    run_epsilon: float
    attempts: int

    def __post_init__(self) -> None:
        """Refuse caps that cap nothing: this is the last door."""
        for name in ("lifetime_epsilon", "study_epsilon", "run_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError("budget", name, getattr(self, name), "a finite number above 0")
        if not 0 < self.delta < 1:
            raise ConfigError("budget", "delta", self.delta, "a number above 0 and below 1")
        if self.attempts < 1:
            raise ConfigError("budget", "attempts", self.attempts, "1 or more")


@dataclass(frozen=True)
class Approval:
    """A person's yes to one plan."""

    study: str
    plan_digest: bytes
    quote: str
    who: str
    when: str


@dataclass
class Task:
    """A round of a study: the one task it stands for, and how far that went."""

    digest: bytes
    attempts: int = 0
    done: Entry | None = None


@dataclass
class Study:
    """What the entries say of one study."""

    plan_digest: bytes | None = None
    budget: Budget | None = None
    reserved: Tally = field(default_factory=lambda: tally(()))
    charged: Tally = field(default_factory=lambda: tally(()))
    tasks: dict[int, Task] = field(default_factory=dict)
    latest: Entry | None = None
    approvals: dict[bytes, Approval] = field(default_factory=dict)

    def holds(self, plan_digest: bytes, planned: Tally) -> bool:
        """Whether this plan is reserved; Refused if another one is."""
        if self.plan_digest is None:
            return False
        if (self.plan_digest, self.reserved) != (plan_digest, planned):
            raise Refused(Rule.PLAN_CONFLICT, "the study has another plan, or this one with other events")
        return True

    def spent(self, more: Tally | None = None) -> Tally:
        """What counts: of every kind of event, the larger of reserved and charged (with `more` charged)."""
        return self.reserved | (self.charged + (more or tally(())))


class State:
    """The fold over all entries."""

    def __init__(self) -> None:
        """Start before the first entry."""
        self.source = ""
        self.unit: Unit = "record"
        self.studies: dict[str, Study] = {}
        self.budget: Budget | None = None

    def absorb(self, entry: Entry) -> None:
        """Take one entry in."""
        body = entry.body
        if entry.kind == "begin":
            self.source, self.unit = body["source"], body["unit"]
            return
        study = self.studies.setdefault(body["study"], Study())
        match entry.kind:
            case "approve":
                digest = bytes.fromhex(body["plan"])
                study.approvals[digest] = Approval(
                    body["study"], digest, body["quote"], body["who"], body["approved"]
                )
            case "reserve":
                study.plan_digest = bytes.fromhex(body["plan"])
                study.reserved = read_events(body["events"])
                study.budget = self.budget = Budget(**body["budget"])
            case "charge":
                task = study.tasks.setdefault(body["round"], Task(bytes.fromhex(body["task"])))
                charged = read_events(body["events"])
                task.attempts += bool(charged)
                study.charged += charged
            case "commit":
                study.tasks[body["round"]].done = entry
                if "state" in body["attachments"]:
                    study.latest = entry
            case _:
                what = f"entry {entry.number} is of a kind, {entry.kind!r}, that this version doesn't know"
                raise UserError(f"ledger: {what}")

    def spent(self) -> Tally:
        """Everything that counts, over all studies."""
        return sum((study.spent() for study in self.studies.values()), tally(()))

    def holds_one_plan(self) -> bool:
        """Whether all that counts is one plan, fixed before any release: then no filter is needed."""
        spenders = [study for study in self.studies.values() if study.spent()]
        return len(spenders) == 1 and spenders[0].spent() == spenders[0].reserved


def written(events: Tally) -> list[dict[str, str | float]]:
    """Write events for an entry's body."""
    return [json.loads(to_json(event)) for event in untally(events)]


def read_events(events: Sequence[Mapping[str, str | float]]) -> Tally:
    """Read them again; raises UserError for what this version doesn't know."""
    return tally(from_json(json.dumps(event, sort_keys=True, separators=(",", ":"))) for event in events)
