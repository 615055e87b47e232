"""The ledger: what was ever done to a site's records, written down before it is done, and what came of it.

One ledger belongs to one *data source*, an identity that is minted when it is begun and that every later
version of the data inherits; so neither a changed row nor a renamed study opens a fresh budget. It stores
events (`common.accounting`), never an ε: what they cost is computed when it is asked. Three entries make a
task:

1. `reserve`: the whole plan of a study, before its first record is read. It counts in full from then on,
   however the run ends.
2. `charge`: one task (study, round, digest), before it reads. Charges draw on the reservation and are never
   refunded. A task that died is charged again, and what goes beyond the reservation must fit into what the
   caps leave: one more of the same, up to a number that plan and caps fix, so stopping earlier tells nothing.
3. `commit`: the release, the student's state and the fulfilment of the charge, in one transaction. From then
   on the same task gets the same bytes, free; nothing else is ever released for that round.

`approve` records that a person agreed to a plan. State follows from the entries (`client.ledger_schema`), and
every process that shares the file works it out for itself; each decision is taken inside the transaction that
writes it down, so two couriers can't spend the same budget twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from client.chain import PATIENCE, Chain, Entry, LedgerError
from client.ledger_schema import Approval, Budget, Refused, State, Study, Task, written
from common.accounting import (
    Event,
    Guarantee,
    Tally,
    Unit,
    epsilon,
    fits_lifetime,
    how_many_more,
    lifetime_epsilon,
    second_opinion,
    tally,
    untally,
)
from common.messages import Rule
from common.rounding import at_most

__all__ = [
    "AlreadyCommitted",
    "Approval",
    "Budget",
    "Entry",
    "Ledger",
    "LedgerError",
    "Price",
    "Refused",
    "Spending",
    "Verdict",
]

AGREEMENT: Final = 0.002
PRV_ERROR: Final = 0.015
"""By how much two accountants may differ without a finding: a share of ε, for numerical ones round, and what
Opacus's adds to be an upper bound."""


class AlreadyCommitted(Exception):
    """Another courier's attempt at this task was committed meanwhile; nothing was charged.

    Attributes:
        release: The bytes that stand.
    """

    def __init__(self, release: bytes) -> None:
        """Carry the bytes."""
        self.release = release
        super().__init__("the task is committed already")


@dataclass(frozen=True)
class Price:
    """What a plan would cost, before a record is read.

    Attributes:
        run: The plan's own guarantee.
        lifetime: The data source's, after it.
        left: Lifetime ε left after it.
        more: How many such plans would still fit after it, each a study of its own; none if a cap refuses it.
        refusal: What would refuse it now, if anything.
    """

    run: Guarantee
    lifetime: Guarantee
    left: float
    more: int
    refusal: Refused | None


@dataclass(frozen=True)
class Spending:
    """What was spent: in all, and by each study as far as its own parameters go."""

    lifetime: Guarantee
    studies: Mapping[str, Guarantee]


@dataclass(frozen=True)
class Verdict:
    """What a full check found.

    Attributes:
        findings: What is wrong, a sentence each; empty if nothing is.
        guarantee: What the ledger supports, in full sentences.
    """

    findings: tuple[str, ...]
    guarantee: str


class Ledger:
    """An open ledger; a context manager that closes it. Threads may share one, processes open one each."""

    def __init__(self, chain: Chain, state: State) -> None:
        """Use `create` or `open`."""
        self._chain, self._state = chain, state

    @classmethod
    def create(
        cls, path: Path, key: bytes, data_source_id: str, unit: Unit = "record", anchor: Path | None = None
    ) -> Self:
        """Begin a data source's ledger, once.

        Args:
            path: The file to make.
            key: The site's secret, 16 bytes or more.
            data_source_id: The identity that all spending is booked under.
            unit: What one unit of privacy is. The default is the weaker claim.
            anchor: A file, best on another disk, that remembers the ledger's end, so that an older copy of it
                is noticed.

        Raises:
            LedgerError: if the ledger or its anchor is there already or can't be written.
        """
        state = State()
        first = ("begin", {"format": 1, "source": data_source_id, "unit": unit})
        return cls(Chain.create(path, key, first, state.absorb, anchor), state)

    @classmethod
    def open(cls, path: Path, key: bytes, anchor: Path | None = None, patience: float = PATIENCE) -> Self:
        """Open a ledger and check every entry.

        Raises:
            LedgerError: naming what is wrong with it; a ledger that fails must not be served from.
        """
        state = State()
        return cls(Chain.open(path, key, state.absorb, anchor, patience), state)

    def close(self) -> None:
        """Close the file; nothing waits to be written."""
        self._chain.close()

    def __enter__(self) -> Self:
        """Return the ledger itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    # ---- A task ----

    def reserve(
        self, study: str, plan_digest: bytes, plan: bytes, events: Sequence[Event], budget: Budget
    ) -> None:
        """Reserve a plan's events, all of them, unless the same plan is reserved already.

        Raises:
            Refused: `PLAN_CONFLICT` if the study has another plan or this one with other events;
                `BUDGET` if a cap would be exceeded.
            LedgerError: if it can't be written.
        """
        planned = tally(events)
        epsilon(events, budget.delta)  # may take seconds under sampling: once, before others have to wait
        with self._chain.writing() as pen:
            known = self._study(study)
            if known.holds(plan_digest, planned):
                return
            self._hold_to_caps(known.spent() + planned, planned, budget)
            body = {
                "study": study,
                "plan": plan_digest.hex(),
                "text": plan.decode(),
                "events": written(planned),
                "budget": asdict(budget),
            }
            pen.append("reserve", body)

    def charge(
        self, study: str, round_number: int, task_digest: bytes, events: Sequence[Event], budget: Budget
    ) -> bytes:
        """Charge one attempt at a task, before it reads a record, and return the chain's head.

        A task without events is public work: it needs no plan and no budget, and may be attempted as often as
        it likes.

        Raises:
            Refused: `ROUND_CONFLICT` if the round stands for another task; `PLAN_CONFLICT` if the study's
                plan holds no such events; `TOO_MANY_ATTEMPTS`; `BUDGET` if the reservation is used up and a
                cap would be exceeded.
            AlreadyCommitted: if the task is done.
            LedgerError: if it can't be written.
        """
        asked = tally(events)
        with self._chain.writing() as pen:
            known = self._study(study)
            task = self._task(study, round_number, task_digest)
            if task is not None and task.done is not None:
                raise AlreadyCommitted(self._chain.attachment(task.done, "release"))
            if asked:
                if not asked.keys() <= known.reserved.keys():
                    raise Refused(
                        Rule.PLAN_CONFLICT, f"study {study} has reserved no such events: {written(asked)}"
                    )
                attempts = task.attempts if task is not None else 0
                if attempts >= budget.attempts:
                    raise Refused(
                        Rule.TOO_MANY_ATTEMPTS, f"round {round_number} was charged {attempts} times"
                    )
                if beyond := known.spent(asked) - known.spent():
                    self._hold_to_caps(known.spent(asked), beyond, budget)
            body = {
                "study": study,
                "round": round_number,
                "task": task_digest.hex(),
                "events": written(asked),
            }
            return pen.append("charge", body).head

    def commit(
        self, study: str, round_number: int, task_digest: bytes, *, release: bytes, student_state: bytes
    ) -> bytes:
        """Make a charged task's release and the student's state durable, together; return what may leave.

        That is the given release, unless another attempt at the task was committed first: then it is that
        one's, and this one never leaves.

        Args:
            study: Name of the study.
            round_number: The task's round.
            task_digest: The task's digest.
            release: The bytes to send.
            student_state: What the study's next task starts from; empty leaves it as it is.

        Raises:
            Refused: `ROUND_CONFLICT` if the round stands for another task.
            ValueError: if the task was never charged.
            LedgerError: if it can't be written; then nothing may leave.
        """
        with self._chain.writing() as pen:
            known = self._study(study)
            task = self._task(study, round_number, task_digest)
            if task is None:
                raise ValueError(
                    f"study {study}, round {round_number}: a task is committed that was never charged"
                )
            if task.done is not None:
                return self._chain.attachment(task.done, "release")
            content = {"release": release} | ({"state": student_state} if student_state else {})
            pen.append("commit", {"study": study, "round": round_number, "task": task_digest.hex()}, content)
            if student_state and known.latest is not None:
                pen.discard(known.latest, "state")
        return release

    def committed(self, study: str, round_number: int, task_digest: bytes) -> bytes | None:
        """Return the release of a committed task, the same bytes as ever, or None if it isn't committed.

        Raises:
            Refused: `ROUND_CONFLICT` if the round stands for another task.
            LedgerError: if the bytes can't be read or were changed.
        """
        with self._chain.reading():
            task = self._task(study, round_number, task_digest)
            return None if task is None or task.done is None else self._chain.attachment(task.done, "release")

    def student_state(self, study: str) -> bytes | None:
        """Return the state that the study's last commit left, or None before the first."""
        with self._chain.reading():
            latest = self._study(study).latest
            return None if latest is None else self._chain.attachment(latest, "state")

    # ---- Approval and price ----

    def approve(self, study: str, plan_digest: bytes, quote: str, who: str, when: str) -> None:
        """Bind a person's agreement to exactly this plan, with the quote that they read."""
        body = {"study": study, "plan": plan_digest.hex(), "quote": quote, "who": who, "approved": when}
        with self._chain.writing() as pen:
            pen.append("approve", body)

    def approved(self, study: str, plan_digest: bytes) -> Approval | None:
        """Return the latest approval of this plan for this study, if a person gave one."""
        with self._chain.reading():
            return self._study(study).approvals.get(plan_digest)

    def quote(self, study: str, plan_digest: bytes, events: Sequence[Event], budget: Budget) -> Price:
        """Say what a plan would cost and what would refuse it; changes nothing."""
        planned = tally(events)
        run = _guarantee(planned, budget.delta, self.unit, "run")
        with self._chain.reading():
            known, spent, refusal = self._study(study), self._state.spent(), None
            try:
                reserved = known.holds(plan_digest, planned)
                if not reserved:
                    self._hold_to_caps(known.spent() + planned, planned, budget)
            except Refused as refused:
                reserved, refusal = False, refused
            after = spent if reserved else spent + planned
            alone = not spent or (reserved and self._state.holds_one_plan())
            lifetime = _guarantee(after, budget.delta, self.unit, "lifetime", alone=alone)
            return Price(
                run=run,
                lifetime=lifetime,
                left=max(0.0, budget.lifetime_epsilon - lifetime.epsilon),
                more=0
                if run.epsilon > min(budget.run_epsilon, budget.study_epsilon)
                else how_many_more(untally(after), events, budget.lifetime_epsilon, budget.delta),
                refusal=refusal,
            )

    # ---- What it says ----

    @property
    def data_source_id(self) -> str:
        """The identity that all spending is booked under."""
        return self._state.source

    @property
    def unit(self) -> Unit:
        """What one unit of privacy is."""
        return self._state.unit

    @property
    def head(self) -> bytes:
        """The chain's head, 32 bytes that say nothing to whoever has no key."""
        with self._chain.reading():
            return self._chain.head

    def knows_head(self, head: bytes) -> bool:
        """Whether this was the chain's head at some time; an older copy doesn't know later ones."""
        with self._chain.reading():
            return self._chain.knows(head)

    def entries(self) -> tuple[Entry, ...]:
        """Return every entry, checked anew, for people to look at."""
        with self._chain.reading():
            return tuple(self._chain.entries())

    def events(self) -> tuple[Event, ...]:
        """Return everything that counts: every plan in full, and what repeated tasks took beyond it."""
        with self._chain.reading():
            return untally(self._state.spent())

    def spending(self, delta: float) -> Spending:
        """Say what was spent, at this δ."""
        with self._chain.reading():
            return Spending(
                lifetime=_lifetime(self._state, delta),
                studies={
                    name: _guarantee(study.spent(), delta, self.unit, "run")
                    for name, study in self._state.studies.items()
                    if study.spent()
                },
            )

    def verify(self) -> Verdict:
        """Check the whole file anew, and every ε by a second accountant; this may take seconds.

        Nothing is raised for what is wrong: it becomes a finding.
        """
        state, findings = State(), []
        try:
            with self._chain.reading():
                if (damage := self._chain.damage()) is not None:
                    findings.append(f"SQLite finds the file damaged: {damage}.")
                for entry in self._chain.entries():
                    state.absorb(entry)
                for study in state.studies.values():
                    for task in study.tasks.values():
                        if task.done is not None:
                            self._chain.attachment(task.done, "release")
                    if study.latest is not None:
                        self._chain.attachment(study.latest, "state")
        except LedgerError as error:
            return Verdict((*findings, f"{error}."), "No guarantee can be given before this is explained.")
        findings += _objections(state)
        return Verdict(tuple(findings), _in_full(state))

    # ---- Within a transaction ----

    def _study(self, name: str) -> Study:
        return self._state.studies.get(name) or Study()

    def _task(self, study: str, round_number: int, digest: bytes) -> Task | None:
        task = self._study(study).tasks.get(round_number)
        if task is not None and task.digest != digest:
            raise Refused(
                Rule.ROUND_CONFLICT, f"round {round_number} of study {study} stands for another task"
            )
        return task

    def _hold_to_caps(self, study: Tally, beyond: Tally, budget: Budget) -> None:
        """Refuse if a cap objects to a study that comes to `study`, or to `beyond` more in the lifetime."""
        cost = epsilon(untally(study), budget.delta)[0]
        for name, cap in (("run-epsilon", budget.run_epsilon), ("study-epsilon", budget.study_epsilon)):
            if not cost <= cap:
                raise Refused(
                    Rule.BUDGET, f"the study would cost ε = {at_most(cost)}, above {name} = {cap:g}"
                )
        spent = untally(self._state.spent())
        if not fits_lifetime(spent, untally(beyond), budget.lifetime_epsilon, budget.delta):
            after = lifetime_epsilon((*spent, *untally(beyond)), budget.delta)[0]
            cap = budget.lifetime_epsilon
            raise Refused(
                Rule.BUDGET, f"the lifetime would cost ε = {at_most(after)}, above lifetime-epsilon = {cap:g}"
            )


# ---- What it comes to --------------------------------------------------------------------------------------


def _guarantee(
    spent: Tally, delta: float, unit: Unit, horizon: Literal["run", "lifetime"], *, alone: bool = False
) -> Guarantee:
    """Account for what was spent in one run, or in a lifetime, which may be that of one plan `alone`."""
    account = epsilon if horizon == "run" or alone else lifetime_epsilon
    cost, accountant = account(untally(spent), delta)
    return Guarantee(cost, delta, unit, "add-remove", accountant, horizon)


def _lifetime(state: State, delta: float) -> Guarantee:
    return _guarantee(state.spent(), delta, state.unit, "lifetime", alone=state.holds_one_plan())


def _objections(state: State) -> list[str]:
    """Hold every ε against its caps and against the second accountant."""
    findings = []
    for name, study in state.studies.items():
        if study.budget is None or not study.spent():
            continue
        delta, events = study.budget.delta, untally(study.spent())
        (first, by), (second, other) = epsilon(events, delta), second_opinion(events, delta)
        if not _agree(first, second):
            findings.append(
                f"Study {name} costs ε = {at_most(first)} by {by}, but {at_most(second)} by {other}."
            )
        if first > min(study.budget.run_epsilon, study.budget.study_epsilon):
            findings.append(
                f"Study {name} costs ε = {at_most(first)}, above the caps that it was reserved under."
            )
    if (budget := state.budget) is not None:
        lifetime = _lifetime(state, budget.delta)
        floor, other = second_opinion(untally(state.spent()), budget.delta)
        if floor > lifetime.epsilon and not _agree(floor, lifetime.epsilon):
            findings.append(f"The lifetime costs {lifetime}, but ε = {at_most(floor)} by {other}.")
        if lifetime.epsilon > budget.lifetime_epsilon:
            findings.append(f"The lifetime costs {lifetime}, above its cap of {budget.lifetime_epsilon:g}.")
    return findings


def _agree(one: float, other: float) -> bool:
    return one == other or abs(one - other) <= PRV_ERROR + AGREEMENT * max(one, other)


def _in_full(state: State) -> str:
    """State the guarantee so that it can be read by itself."""
    if state.budget is None or not state.spent():
        return f"Nothing was ever reserved for data source {state.source}: none of its records has been used."
    lifetime = _lifetime(state, state.budget.delta)
    whose = "one patient with all records" if state.unit == "patient" else "one record"
    runs = [
        f"Study {name}: {_guarantee(study.spent(), study.budget.delta, state.unit, 'run')}."
        for name, study in state.studies.items()
        if study.budget is not None and study.spent()
    ]
    claim = (
        f"All that ever left data source {state.source}, and all that may still leave under its reserved"
        f" plans, is together (ε, δ)-differentially private with ε = {at_most(lifetime.epsilon)} and δ ="
        f" {lifetime.delta!r}. Whether {whose} is added to the data or removed changes the probability of"
        f" anything that can be done with it by a factor of e^ε at most, plus δ. The horizon is the data"
        f" source's lifetime so far; the accountant, from the recorded events, is {lifetime.accountant}."
    )
    return " ".join((claim, *runs))
