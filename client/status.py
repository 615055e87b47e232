"""`grandrounds site status`: the site at one look. It only reads, and keeps no custodian from serving."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from rich.table import Table

from client.books import verify
from client.ledger import LedgerError
from client.policy import ServedPolicy
from client.served import asked_plans, certificates, open_ledger, release_log
from client.service import SERVICE
from client.site_metrics import queue_in
from client.standing import Spent, Standing, standing_of
from common.certificates import Term, terms
from common.rounding import at_least

TIMEOUT = 2.0
"""Seconds to wait for a custodian's answer."""
ENDS_SOON = {
    "courier": "ask the coordinator for another kit",
    "authority": "ask the coordinator, who must found another federation",
    "custodian": "make it another",
}
"""What to do about a certificate, by whose it is."""


@dataclass(frozen=True)
class Status:
    """What is so, when it was asked.

    Attributes:
        policy: The site's policy.
        serving: Whether a custodian answers at the policy's address. On TCP, where only a courier's
            certificate opens the door, whether it keeps its metrics up to date.
        queue: Calls that it works on or that wait, where it says so.
        standing: Budget, releases and plans; None where the ledger can't be trusted.
        findings: What is wrong with the ledger; empty if nothing is.
        certificates: How long those are good that the site can't do without.
    """

    policy: ServedPolicy
    serving: bool
    queue: int | None
    standing: Standing | None
    findings: tuple[str, ...]
    certificates: tuple[Term, ...]

    @property
    def well(self) -> bool:
        """Whether it serves from a sound ledger."""
        return self.serving and not self.findings

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        policy = self.policy
        return {
            "site": policy.site,
            "unit": policy.data.unit,
            "declared_size": policy.data.declared_size,
            "approval": policy.approval,
            "caps": policy.budget.model_dump(),
            "rounds": policy.allow.rounds,
            "every_seconds": policy.replies.every_seconds,
            "listen": policy.service.listen,
            "serving": self.serving,
            "queue": self.queue,
            "ledger": {"verified": not self.findings, "findings": self.findings},
            "certificates": [one.as_json() for one in self.certificates],
            "standing": None if self.standing is None else _as_json(self.standing),
        }

    def table(self) -> Table:
        """The same for a terminal."""
        table = Table(title=f"site {self.policy.site}", show_header=False, title_justify="left")
        for what, says in self._lines():
            table.add_row(what, says)
        return table

    def _lines(self) -> Iterator[tuple[str, str]]:
        policy, standing = self.policy, self.standing
        budget = policy.budget
        yield "unit", f"{policy.data.unit}; declared size {policy.data.declared_size}"
        caps = budget.lifetime_epsilon, budget.study_epsilon, budget.run_epsilon
        yield "caps on ε", "lifetime {:g}, study {:g}, run {:g}; δ = {!r}".format(*caps, budget.delta)
        yield "rounds", f"{policy.allow.rounds} at most; answers every {policy.replies.every_seconds:g} s"
        yield "approval", "by a person" if policy.approval else "not needed"
        yield "custodian", f"{'serving' if self.serving else 'NOT SERVING'} at {policy.service.listen}"
        if self.queue is not None:
            yield "queue", f"calls that are worked on or wait: {self.queue}"
        yield "ledger", "; ".join(f"FAIL {one}" for one in self.findings) or "verified"
        for one in self.certificates:
            warning = f"WARNING, {ENDS_SOON[one.of]}: " if one.soon else ""
            yield "certificate", f"{warning}{one}"
        if standing is None:
            return
        yield "lifetime", _in_words(standing.lifetime)
        for name, spent in standing.studies.items():
            yield f"study {name}", _in_words(spent)
        if (last := standing.last_release) is not None:
            when = f"{last.when}, study {last.study}, round {last.round}"
            yield "last release", f"{when}; {standing.releases} in all"
        yield "plans", f"that wait for approval: {standing.plans_waiting}"


def status_of(policy: ServedPolicy) -> Status:
    """Look at a site.

    Raises:
        UserError: if its key isn't there or not its own alone, its log of releases isn't one, or a
            certificate can't be read.
    """
    queue, standing = queue_in(policy), None
    try:
        with open_ledger(policy) as ledger:
            findings = verify(ledger, release_log(policy)).findings
            standing = standing_of(policy, ledger, release_log(policy), asked_plans(policy))
    except LedgerError as error:
        findings = (f"{error}.",)
    serving = _answers(policy.service.listen) if _on_socket(policy) else queue is not None
    ends = terms(certificates(policy))
    return Status(policy, serving, queue if serving else None, standing, findings, ends)


def _on_socket(policy: ServedPolicy) -> bool:
    return policy.service.listen.startswith("unix:")


def _answers(address: str) -> bool:
    """Whether the custodian behind a Unix socket says that it serves."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(service=SERVICE), timeout=TIMEOUT)
        except grpc.RpcError:
            return False
    return bool(answer.status == HealthCheckResponse.SERVING)


def _as_json(standing: Standing) -> dict[str, Any]:
    last = standing.last_release
    return {
        "lifetime": _spent(standing.lifetime),
        "studies": {name: _spent(spent) for name, spent in standing.studies.items()},
        "last_release": None if last is None else vars(last),
        "releases": standing.releases,
        "plans_waiting": standing.plans_waiting,
    }


def _spent(spent: Spent) -> dict[str, Any]:
    return {**vars(spent.guarantee), "cap": spent.cap, "left": spent.left}


def _in_words(spent: Spent) -> str:
    return f"spent {spent.guarantee}; left ε = {at_least(spent.left)} of {spent.cap:g}"
