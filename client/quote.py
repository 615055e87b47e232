"""What a run would cost here, said before any record is touched.

The price follows from the plan, what is left from the ledger's events, and the refusing rule from the
policy and both. The hospital sees all of it; a courier is told the price, and the name of the rule
(`client.service`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.ledger import Ledger
from client.policy import ANY, ServedPolicy, SitePolicy
from client.shelf import shelf_of
from common.accounting import Guarantee
from common.datasets.description import read_description
from common.messages import Rule
from common.plan import Plan, plan_of
from common.rounding import at_least
from common.run_config_files import read_run_config


@dataclass(frozen=True)
class Quote:
    """A run's price and what comes of it.

    Attributes:
        plan: What is priced.
        run: What the run costs.
        lifetime: What will have been spent after it, in all.
        left: Lifetime ε left after it.
        more: How many such runs would still fit after it.
        refused_by: The rule that would refuse it now, if any.
        reason: Why, for the hospital.
    """

    plan: Plan
    run: Guarantee
    lifetime: Guarantee
    left: float
    more: int
    refused_by: Rule | None
    reason: str

    def __str__(self) -> str:
        """In sentences, as a person reads them who approves."""
        plan, rule = self.plan, self.refused_by
        return "\n".join(
            (
                f"Study {plan.study}, plan {plan.digest().hex()[:16]}…, method {plan.method}: "
                f"{plan.rounds} rounds, private steps in each: {plan.steps_per_round}.",
                f"This run costs {self.run}.",
                f"After it the lifetime stands at {self.lifetime}; "
                f"ε = {at_least(self.left)} is left, and of more such runs there fit {self.more}.",
                "No rule refuses it." if rule is None else f"Refused by {rule.label}: {self.reason}.",
            )
        )

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "study": self.plan.study,
            "plan": self.plan.digest().hex(),
            "run": vars(self.run),
            "lifetime": vars(self.lifetime),
            "lifetime_epsilon_left": self.left,
            "more_such_runs": self.more,
            "refused_by": None if self.refused_by is None else self.refused_by.label,
            "reason": self.reason,
        }


def quote(policy: SitePolicy, ledger: Ledger, plan: Plan) -> Quote:
    """Price a plan.

    Raises:
        UserError: if no accountant can price it.
    """
    priced = ledger.quote(plan.study, plan.digest(), plan.events(), policy.caps())
    objection = policy.refusal(plan)
    if objection is None and priced.refusal is not None:
        objection = priced.refusal.rule, priced.refusal.detail
    if objection is None and policy.approval and ledger.approved(plan.study, plan.digest()) is None:
        objection = Rule.NOT_APPROVED, "no person has approved this plan"
    rule, reason = objection or (None, "")
    return Quote(plan, priced.run, priced.lifetime, priced.left, priced.more, rule, reason)


def plan_from_run_config(policy: ServedPolicy, sources: Sequence[str], study: str) -> Plan:
    """Draw up the plan that a run configuration asks for.

    The public set is the one that the policy allows or that is here, if there is just one; what a run costs
    doesn't depend on it, but the plan's digest does, so only a plan that came from the coordinator can be
    approved.

    Raises:
        UserError: if the run configuration isn't right.
    """
    config = read_run_config(sources)
    allowed = [digest for digest in policy.allow.proxies if digest != ANY]
    digests = allowed or [proxy.digest.hex() for proxy in shelf_of(policy).all_proxies()]
    return plan_of(
        config,
        study=study or config.run_id or "unnamed",
        proxy_digest=bytes.fromhex(digests[0]) if len(digests) == 1 else bytes(32),
        classes=len(read_description(Path(policy.data.description)).classes),
    )
