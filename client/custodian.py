"""The custodian: the program that the hospital trusts with its patients, its budget and its voice.

One task passes through these doors, in this order:

1. decode the body as hostile bytes;
2. the policy: does the hospital allow this plan?
3. the proxy: does the site know the public cases by this digest?
4. the ledger: a committed task gets the same bytes again, free; otherwise reserve the plan, then charge the task, before any record is read;
5. the lesson (`client.student`): soft labels, private steps, opinion;
6. the egress gate builds the release;
7. release, student state and charge are committed in one transaction; only then do bytes leave.

A refusal carries a rule's name and nothing else. After a charge the answer is always a well-formed release: a fault of the data is the site's
own business and shows in its log only. A site whose budget is spent keeps learning from the teacher and answers without private steps.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

import numpy as np

from client import egress
from client.egress import Opinion
from client.ledger import AlreadyCommitted, Ledger, Refused
from client.noise import PrivateRandomness
from client.policy import SitePolicy
from common.architectures import Architecture, architecture_of
from common.messages import Greeting, MessageError, Offer, Receipt, Refusal, Rule, Task
from common.proxy import Proxy

if TYPE_CHECKING:  # torch is loaded with the first task, not before
    from client.private_data import PrivateRecords
    from client.student import Student

MOST_PROXY_BYTES = 1 << 30

log = logging.getLogger("grandrounds.custodian")


@dataclass
class Custodian:
    """A hospital's side of the protocol.

    Attributes:
        policy: What the hospital allows.
        records: Its patients, unread until a charged task asks for them.
        ledger: Its budget.
        proxies: Folder of the public sets it has received, each under its digest.
        randomness: Makes the private stream of one task; a seeded one only in simulations.
        mixed: The architecture this site uses when a plan says `students = "mixed"` and the policy names none.
    """

    policy: SitePolicy
    records: "PrivateRecords"
    ledger: Ledger
    proxies: Path
    randomness: Callable[[Task], PrivateRandomness] = field(default=lambda _: PrivateRandomness())
    mixed: Callable[[tuple[int, ...]], Architecture] | None = None
    _proxy: Proxy | None = None
    _student: "tuple[bytes, Student] | None" = None

    def offer(self, body: bytes) -> bytes:
        """Introduce the site, and say whether the proxy that a run uses is known here."""
        try:
            asked = Offer.decode(body).proxy_digest
        except MessageError:
            return Refusal(Rule.MALFORMED).encode()
        knows_proxy = self._find_proxy(asked) is not None
        return Greeting(self.policy.site, self.policy.data.declared_size, knows_proxy).encode()

    def accept_proxy(self, body: bytes) -> bytes:
        """Keep a public set under its digest."""
        try:
            proxy = Proxy.from_bytes(body, MOST_PROXY_BYTES)
        except ValueError:
            return Refusal(Rule.MALFORMED).encode()
        self._keep(self._proxy_path(proxy.digest), body)
        self._proxy = proxy
        return Receipt(proxy.digest).encode()

    def learn(self, body: bytes) -> bytes:
        """Answer one task with a release or a refusal."""
        try:
            task = Task.decode(body)
        except MessageError:
            return Refusal(Rule.MALFORMED).encode()
        plan, digest = task.plan, task.digest()
        if (objection := self.policy.refusal(plan)) is not None:
            rule, reason = objection
            log.warning("study %s refused: %s", plan.study, reason)
            return Refusal(rule, digest).encode()
        asked = bytes.fromhex(plan.proxy_digest)
        proxy = self._find_proxy(asked)
        if proxy is None:
            return self._unknown_proxy(asked)
        if not _fits(task, proxy):
            return Refusal(Rule.MALFORMED, digest).encode()
        try:
            again = self.ledger.committed(plan.study, task.round, digest)
            if again is not None:
                return again
            private, head = self._charge(task)
        except AlreadyCommitted as done:
            return done.release
        except Refused as refused:
            log.warning("study %s round %d refused: %s", plan.study, task.round, refused)
            return Refusal(refused.rule, digest).encode()
        opinion = self._lesson(task, proxy, private=private)
        body = egress.release(task, opinion, steps=plan.steps_per_round if private else 0, head=head)
        return self.ledger.commit(plan.study, task.round, digest, release=body, student_state=opinion.state)

    def deliver(self, body: bytes) -> bytes:
        """Keep the final student that all sites made together."""
        from common.models import ModelFileError, read_card

        received = Path(self.policy.state) / "received.safetensors"
        self._keep(received, body)
        try:
            read_card(received)
        except ModelFileError:
            received.unlink()
            return Refusal(Rule.MALFORMED).encode()
        received.replace(received.with_name("student.safetensors"))
        return Receipt(hashlib.sha256(body).digest()).encode()

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
        """Hold the lesson; whatever happens in it, an opinion comes out."""
        try:
            student = self._enrol(task, proxy)
            if not private:
                return student.public_lesson(task)
            try:
                return student.private_lesson(task, self.records, self.policy.data.declared_size, self.randomness(task))
            except Exception:
                # The reason may hold private values: it goes to the site's own log, and the coordinator sees an ordinary release.
                log.exception("study %s round %d: the private lesson failed", task.plan.study, task.round)
                return self._enrol(task, proxy).public_lesson(task)
        except Exception:
            log.exception("study %s round %d: the lesson failed", task.plan.study, task.round)
            return Opinion(np.zeros((len(task.cases_P), task.plan.classes), dtype=np.float32), (), b"")

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

    def _find_proxy(self, digest: bytes) -> Proxy | None:
        if self._proxy is None or self._proxy.digest != digest:
            path = self._proxy_path(digest)
            self._proxy = Proxy.load(path, MOST_PROXY_BYTES) if path.exists() else self._proxy
        return self._proxy if self._proxy is not None and self._proxy.digest == digest else None

    def _unknown_proxy(self, asked: bytes) -> bytes:
        known = self._proxy.digest if self._proxy is not None else bytes(32)
        return Refusal(Rule.UNKNOWN_PROXY, asked, known).encode()

    def _proxy_path(self, digest: bytes) -> Path:
        return self.proxies / f"{digest.hex()}.safetensors"

    @staticmethod
    def _keep(path: Path, body: bytes) -> None:
        """Write a file whole or not at all, also where several custodians of a simulation share the folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(body)
        Path(file.name).replace(path)


def _fits(task: Task, proxy: Proxy) -> bool:
    return bool(task.cases_P[-1] < len(proxy)) and task.plan.classes == len(proxy.preprocessing.classes)
