"""What a run would cost here, said before any record is touched.

The price follows from the plan, what is left from the ledger's events, and the refusing rule from the policy and both.
The hospital sees all of it. A courier sees the price, and the name of the rule; a plan that the policy refuses for what
it is has no price for a courier, so that nobody can make the site reckon.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from client.custodian_pb2 import Price
from client.ledger import Ledger
from client.policy import SitePolicy
from client.served import ServedSite
from common.accounting import Guarantee
from common.messages import Rule
from common.plan import Plan


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
        verdict = "No rule refuses it." if self.refused_by is None else f"Refused by {self.refused_by.label}: {self.reason}."
        return (
            f"Study {self.plan.study}, plan {self.plan.digest().hex()[:16]}…: {self.plan.rounds} rounds of "
            f"{self.plan.steps_per_round} private steps, method {self.plan.method}.\n"
            f"This run costs {self.run}.\n"
            f"After it the lifetime stands at {self.lifetime}; ε = {self.left:.4g} is left, enough for {self.more} more such runs.\n"
            f"{verdict}"
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


def price_for_courier(site: ServedSite, plan_json: bytes) -> Price:
    """Answer a courier, who may learn a run's cost and which rule refuses it."""
    try:
        plan = Plan.model_validate_json(plan_json)
    except ValidationError:
        return Price(refused_by=Rule.MALFORMED.label)
    if (objection := site.policy.refusal(plan)) is not None:
        return Price(refused_by=objection[0].label)
    priced = quote(site.policy, site.ledger, plan)
    if priced.refused_by is Rule.NOT_APPROVED:
        site.asked.keep(plan)
    run = priced.run
    return Price(
        epsilon=run.epsilon,
        delta=run.delta,
        unit=run.unit,
        adjacency=run.adjacency,
        accountant=run.accountant,
        refused_by="" if priced.refused_by is None else priced.refused_by.label,
    )
