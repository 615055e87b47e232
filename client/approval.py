"""Approval: a person at the hospital reads what a plan would cost and says yes to exactly that plan.

A plan that came without approval is refused and kept here, so that the person finds it by its digest. What is bound
into the ledger is the study, the plan's digest, the quote that was read, who read it, and when.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from common.plan import Plan

MOST_ASKED = 64
"""Plans that are kept for a person to look at: nobody can fill the disk with them."""


@dataclass(frozen=True)
class AskedPlans:
    """Plans that couriers brought, each in a file under its digest.

    Attributes:
        folder: Where they lie.
    """

    folder: Path

    def keep(self, plan: Plan) -> None:
        """Keep a plan for a person to look at, if there aren't too many."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{plan.digest().hex()}.json"
        if not path.exists() and len(list(self.folder.iterdir())) < MOST_ASKED:
            path.write_bytes(plan.canonical())

    def all(self) -> list[Plan]:
        """Every kept plan, the latest last; a file that a crash cut short is left out."""
        plans = []
        for path in sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
            try:
                plans.append(Plan.model_validate_json(path.read_bytes()))
            except ValidationError:
                path.unlink()
        return plans

    def drop(self, plan: Plan) -> None:
        """Forget a plan that was approved or turned down."""
        (self.folder / f"{plan.digest().hex()}.json").unlink(missing_ok=True)
