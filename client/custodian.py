"""The custodian: the program that the hospital trusts with its patients, its budget and its voice.

One task passes through these doors, in this order:

1. decode the body as hostile bytes;
2. the policy: does the hospital allow this plan, and has a person approved it where one must?
3. the proxy: does the site know the public cases by this digest, and do its records have such columns?
4. the head: does the ledger know the one that the coordinator brings back?
5. the ledger: a committed task gets the same bytes again, free; otherwise reserve the plan, then charge the
   task, before any record is read;
6. the lesson (`client.student`): soft labels, private steps, opinion;
7. the egress gate builds the release;
8. release, student state and charge are committed in one transaction; only then do bytes leave.

A refusal carries a rule's name and nothing else. After a charge the answer is always a well-formed release:
a fault of the data is the site's own business and shows in its log only. A site whose budget is spent keeps
learning from the teacher and answers without private steps.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from threading import current_thread, main_thread
from typing import TYPE_CHECKING

import numpy as np

from client import egress
from client.egress import Opinion
from client.ledger import AlreadyCommitted, Ledger, LedgerError, Refused
from client.policy import SitePolicy
from client.shelf import MOST_PROXY_BYTES, Shelf, ShelfFull
from common.architectures import Architecture, architecture_of
from common.config import MOST_STEPS
from common.errors import USERS_CODE
from common.logs import about
from common.messages import NO_HEAD, Greeting, MessageError, Offer, Receipt, Refusal, Rule, Task
from common.proxy import Proxy

if TYPE_CHECKING:  # what a lesson needs is loaded with the first task, not before
    from client.noise import PrivateRandomness
    from client.private_data import PrivateRecords
    from client.student import Student

log = logging.getLogger("grandrounds.custodian")


def fresh_randomness(task: Task) -> "PrivateRandomness":
    """A private stream under a key that nobody knows and nobody keeps."""
    from client.noise import PrivateRandomness

    return PrivateRandomness()


@dataclass
class Custodian:
    """A hospital's side of the protocol.

    Attributes:
        policy: What the hospital allows.
        open_records: Makes the readers of its patients' records, of which none is read until a charged task
            asks.
        ledger: Its budget.
        shelf: The public files it was sent.
        columns: What its data description names; a proxy that asks for other columns is refused. None takes
            any.
        randomness: Makes the private stream of one task; a seeded one only in simulations.
        mixed: The architecture this site uses when a plan says `students = "mixed"` and the policy names
            none.
    """

    policy: SitePolicy
    open_records: "Callable[[], PrivateRecords]"
    ledger: Ledger
    shelf: Shelf
    columns: frozenset[str] | None = None
    randomness: "Callable[[Task], PrivateRandomness]" = fresh_randomness
    mixed: Callable[[tuple[int, ...]], Architecture] | None = None
    _student: "tuple[bytes, Student] | None" = None

    def offer(self, body: bytes) -> bytes:
        """Introduce the site, and say whether the proxy that a run uses is known here."""
        try:
            asked = Offer.decode(body).proxy_digest
        except MessageError:
            return Refusal(Rule.MALFORMED).encode()
        knows_proxy = self.shelf.proxy(asked) is not None
        policy = self.policy
        return Greeting(
            policy.site,
            policy.data.declared_size,
            most_epsilon=policy.budget.run_epsilon,
            most_rounds=min(policy.allow.rounds, MOST_STEPS),
            knows_proxy=knows_proxy,
        ).encode()

    def accept_proxy(self, body: bytes) -> bytes:
        """Keep a public set under its digest."""
        try:
            proxy = Proxy.from_bytes(body, MOST_PROXY_BYTES)
        except ValueError:
            return Refusal(Rule.MALFORMED).encode()
        if not self.policy.takes_proxy(proxy.digest.hex()):
            return Refusal(Rule.NOT_ALLOWED, proxy.digest).encode()
        try:
            self.shelf.keep_proxy(proxy, body)
        except ShelfFull as full:
            log.warning("a public set was refused: %s", full)
            return Refusal(Rule.UNAVAILABLE, proxy.digest).encode()
        return Receipt(proxy.digest).encode()

    def learn(self, body: bytes) -> bytes:
        """Answer one task with a release or a refusal."""
        try:
            task = Task.decode(body)
        except MessageError:
            return Refusal(Rule.MALFORMED).encode()
        with about(run=task.plan.study, round=task.round, site=self.policy.site):
            return self._answer(task)

    def _answer(self, task: Task) -> bytes:
        plan, digest = task.plan, task.digest()
        try:
            proxy = self._admit(task)
            again = self.ledger.committed(plan.study, task.round, digest)
            if again is not None:
                return again
            private, head = self._charge(task)
            opinion = self._lesson(task, proxy, private=private)
            release = egress.release(task, opinion, steps=plan.steps_per_round if private else 0, head=head)
            return self.ledger.commit(
                plan.study, task.round, digest, release=release, student_state=opinion.state
            )
        except AlreadyCommitted as done:
            return done.release
        except Refused as refused:
            log.warning("study %s round %d refused: %s", plan.study, task.round, refused)
            known = self.shelf.latest if refused.rule is Rule.UNKNOWN_PROXY else bytes(32)
            about = bytes.fromhex(plan.proxy_digest) if refused.rule is Rule.UNKNOWN_PROXY else digest
            return Refusal(refused.rule, about, known).encode()
        except LedgerError as error:
            # What the ledger doesn't hold must not leave, whatever was charged.
            log.error("study %s round %d: %s", plan.study, task.round, error)
            return Refusal(Rule.UNAVAILABLE, digest).encode()

    def deliver(self, body: bytes) -> bytes:
        """Keep the final student that all sites made together."""
        try:
            return Receipt(self.shelf.keep_student(body)).encode()
        except ValueError:
            return Refusal(Rule.MALFORMED).encode()

    def _admit(self, task: Task) -> Proxy:
        """Hold a task against everything that is known without the records, and return its proxy.

        Raises:
            Refused: by the first rule that objects.
        """
        plan = task.plan
        if (objection := self.policy.refusal(plan)) is not None:
            raise Refused(*objection)
        if self.policy.approval and self.ledger.approved(plan.study, plan.digest()) is None:
            raise Refused(Rule.NOT_APPROVED, f"no person has approved plan {plan.digest().hex()}")
        proxy = self.shelf.proxy(bytes.fromhex(plan.proxy_digest))
        if proxy is None:
            raise Refused(Rule.UNKNOWN_PROXY, f"there is no public set {plan.proxy_digest} here")
        if task.cases_P[-1] >= len(proxy) or plan.classes != len(proxy.preprocessing.classes):
            raise Refused(Rule.MALFORMED, "cases or classes that the public set doesn't have")
        asked = {feature.name for feature in proxy.preprocessing.features}
        if self.columns is not None and not asked <= self.columns:
            strange = " and no ".join(sorted(asked - self.columns))
            raise Refused(Rule.NOT_ALLOWED, f"the data description has no column {strange}")
        if task.head != NO_HEAD and not self.ledger.knows_head(task.head):
            raise Refused(Rule.UNKNOWN_HEAD, "the coordinator brings a head that this ledger never had")
        return proxy

    def _charge(self, task: Task) -> tuple[bool, bytes]:
        """Reserve the plan and charge the task.

        Returns:
            Whether the task may read private records (not where the budget is spent), and the ledger's head.

        Raises:
            Refused: if a rule other than the budget objects.
            AlreadyCommitted: if another courier brought the same task meanwhile.
        """
        plan, budget = task.plan, self.policy.caps()
        asked = (plan.study, task.round, task.digest())
        try:
            self.ledger.reserve(plan.study, plan.digest(), plan.canonical(), plan.events(), budget)
            return True, self.ledger.charge(*asked, plan.task_events(task.round), budget)
        except Refused as refused:
            if refused.rule is not Rule.BUDGET:
                raise
            log.warning("study %s round %d: public work only: %s", plan.study, task.round, refused)
            return False, self.ledger.charge(*asked, (), budget)

    def _lesson(self, task: Task, proxy: Proxy, *, private: bool) -> Opinion:
        """Hold the lesson; whatever happens in it, an opinion comes out.

        A private lesson that fails is held again over no records at all: the coordinator gets its noise and
        sees nothing of the failure, whose reason may hold private values and goes to the site's own log.
        """
        size, plan = self.policy.data.declared_size, task.plan
        lessons: list[Callable[[Student], Opinion]] = [lambda student: student.public_lesson(task)]
        if private:
            from client.private_data import Nobody

            lessons = [
                lambda student: student.private_lesson(task, self._records, size, self.randomness(task)),
                lambda student: student.private_lesson(task, Nobody(), size, self.randomness(task)),
                *lessons,
            ]
        for lesson in lessons:
            try:
                return lesson(self._enrol(task, proxy))
            except USERS_CODE as error:
                # A model that exits ends no lesson. In the main thread, where only simulations hold lessons,
                # it may be SIGTERM.
                if isinstance(error, SystemExit) and current_thread() is main_thread():
                    raise
                log.exception("study %s round %d: the lesson failed", plan.study, task.round)
        return Opinion(np.zeros((len(task.cases_P), plan.classes), dtype=np.float32), {}, b"")

    @cached_property
    def _records(self) -> "PrivateRecords":
        return self.open_records()

    def _enrol(self, task: Task, proxy: Proxy) -> "Student":
        """The run's student, with the weights of its last committed release."""
        from client.student import Student

        plan = task.plan
        if self._student is None or self._student[0] != plan.digest():
            chosen = self._architecture(task, proxy)
            student = Student.enrol(plan, proxy, chosen, self.policy.site, self.policy.import_paths)
            self._student = (plan.digest(), student)
        _, student = self._student
        student.restart(self.ledger.student_state(plan.study))
        return student

    def _architecture(self, task: Task, proxy: Proxy) -> Architecture:
        if task.plan.students == "mixed" and self.mixed is not None:
            return self.policy.architecture(self.mixed(proxy.preprocessing.case_shape))
        return self.policy.architecture(architecture_of(task.plan.student))
