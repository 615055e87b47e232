"""Approval: a person at the hospital reads what a plan would cost and says yes to exactly that plan.

A plan that came without approval is refused and kept here, so that the person finds it by its digest. What
is bound into the ledger is the study, the plan's digest, the quote that was read, who read it, and when.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from client.ledger import Ledger
from client.quote import Quote
from common.errors import UserError
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
        if not path.exists() and self.waiting() < MOST_ASKED:
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

    def waiting(self) -> int:
        """How many plans are kept."""
        return len(list(self.folder.glob("*.json")))

    def drop(self, plan: Plan) -> None:
        """Forget a plan that was approved or turned down."""
        (self.folder / f"{plan.digest().hex()}.json").unlink(missing_ok=True)


def plan_named(asked: AskedPlans, name: str) -> Plan:
    """Find a plan by its file, or by the beginning of its digest among those that were asked for.

    Raises:
        UserError: if there is no such plan, or more than one.
    """
    if Path(name).is_file():
        try:
            return Plan.model_validate_json(Path(name).read_bytes())
        except ValidationError:
            raise UserError(f"{name} is not a plan") from None
    found = [plan for plan in asked.all() if plan.digest().hex().startswith(name)]
    if not found:
        raise UserError(f"{name}: no such file, and no plan that was asked for has a digest that begins so")
    if len(found) != 1:
        raise UserError(f"{len(found)} plans that were asked for have a digest that begins with {name!r}")
    return found[0]


def approve(ledger: Ledger, quote: Quote, who: str) -> None:
    """Bind a person's yes to exactly the plan whose quote they read."""
    plan, when = quote.plan, datetime.now(UTC).isoformat(timespec="seconds")
    ledger.approve(plan.study, plan.digest(), json.dumps(quote.as_json(), ensure_ascii=False), who, when)
