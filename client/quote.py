"""What a run would cost here, said before any record is touched.

The price follows from the plan, what is left from the ledger's events, and the refusing rule from the
policy and both. The hospital sees all of it; a courier is told the price, and the name of the rule
(`client.service`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.ledger import Ledger, Price
from client.policy import ANY, ServedPolicy, SitePolicy
from client.shelf import shelf_of
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
        price: What it costs, by the ledger.
        refused_by: The rule that would refuse it now, if any.
        reason: Why, for the hospital.
    """

    plan: Plan
    price: Price
    refused_by: Rule | None
    reason: str

    def __str__(self) -> str:
        """In sentences, as a person reads them who approves."""
        plan, price = self.plan, self.price
        return "\n".join(
            (
                f"Study {plan.study}, plan {plan.digest().hex()[:16]}…, method {plan.method}: "
                f"{plan.rounds} rounds, private steps in each: {plan.steps_per_round}.",
                f"This run costs {price.run}.",
                f"After it the lifetime stands at {price.lifetime}; ε = {at_least(price.left)} is left, "
                f"and of more such runs there fit {price.more}, each a study of its own.",
                self._verdict(),
            )
        )

    def _verdict(self) -> str:
        match self.refused_by:
            case None:
                return "No rule refuses it."
            case Rule.NOT_APPROVED:
                return "No rule refuses it once a person has approved it."
            case Rule.BUDGET:
                return f"No private step of it fits the budget ({self.reason}): public work alone is left."
            case rule:
                return f"Refused by {rule.label}: {self.reason}."

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "study": self.plan.study,
            "plan": self.plan.digest().hex(),
            "run": vars(self.price.run),
            "lifetime": vars(self.price.lifetime),
            "lifetime_epsilon_left": self.price.left,
            "more_such_runs": self.price.more,
            "refused_by": None if self.refused_by is None else self.refused_by.label,
            "reason": self.reason,
        }


def quote(policy: SitePolicy, ledger: Ledger, plan: Plan) -> Quote:
    """Price a plan.

    Raises:
        UserError: if no accountant can price it.
    """
    price = ledger.quote(plan.study, plan.digest(), plan.events(), policy.caps())
    objection = policy.refusal(plan)
    if objection is None and price.refusal is not None:
        objection = price.refusal.rule, price.refusal.detail
    if objection is None and policy.approval and ledger.approved(plan.study, plan.digest()) is None:
        objection = Rule.NOT_APPROVED, "no person has approved this plan"
    rule, reason = objection or (None, "")
    return Quote(plan, price, rule, reason)


def plan_from_run_config(policy: ServedPolicy, sources: Sequence[str], study: str) -> Plan:
    """Draw up the plan that a run configuration asks for, within the site's caps as a coordinator would.

    The public set is the one that the policy allows or that is here, if there is just one; what a run costs
    doesn't depend on it, but the plan's digest does, so only a plan that came from the coordinator can be
    approved.

    Raises:
        UserError: if the run configuration isn't right.
    """
    config = read_run_config(sources)
    allowed = [digest for digest in policy.allow.proxies if digest != ANY]
    digests = allowed or [proxy.digest.hex() for proxy in shelf_of(policy).all_proxies()]
    plan = plan_of(
        config,
        study=study or config.run_id or "unnamed",
        proxy_digest=bytes.fromhex(digests[0]) if len(digests) == 1 else bytes(32),
        classes=len(read_description(Path(policy.data.description)).classes),
    )
    return plan.within(policy.budget.run_epsilon, policy.allow.rounds)
