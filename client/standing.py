"""Where a site stands: what is spent and left, what was sent last, who waits for a person.

It follows from the ledger, the log of releases and the plans that wait, so a custodian that serves and a
command beside it say the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from client.approval import AskedPlans
from client.ledger import Ledger
from client.policy import SitePolicy
from client.release_log import ReleaseLog, Sent
from common.accounting import Guarantee


@dataclass(frozen=True)
class Spent:
    """A budget's share that is spent.

    Attributes:
        guarantee: What was spent, with δ, unit, adjacency, accountant and horizon.
        cap: The most that may be.
    """

    guarantee: Guarantee
    cap: float

    @property
    def left(self) -> float:
        """ε that is left; 0 where the cap was lowered below what is spent."""
        return max(0.0, self.cap - self.guarantee.epsilon)


@dataclass(frozen=True)
class Standing:
    """Where a site stands.

    Attributes:
        lifetime: The budget of all that is ever done to the data source.
        studies: Each study's, as far as its own parameters go.
        last_release: What left last, if anything did.
        releases: How many releases left.
        plans_waiting: Plans that wait for a person's approval.
    """

    lifetime: Spent
    studies: Mapping[str, Spent]
    last_release: Sent | None
    releases: int
    plans_waiting: int


def standing_of(policy: SitePolicy, ledger: Ledger, releases: ReleaseLog, asked: AskedPlans) -> Standing:
    """Read where a site stands; changes nothing.

    Raises:
        UserError: if the ledger or the log of releases isn't sound.
    """
    budget, spending, sent = policy.budget, ledger.spending(policy.budget.delta), list(releases.read())
    return Standing(
        lifetime=Spent(spending.lifetime, budget.lifetime_epsilon),
        studies={name: Spent(spent, budget.study_epsilon) for name, spent in spending.studies.items()},
        last_release=sent[-1] if sent else None,
        releases=len(sent),
        plans_waiting=asked.waiting(),
    )
