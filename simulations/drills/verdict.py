"""What must hold after a drill, whatever broke: studies complete, and every site's books are right.

A site that died in the middle of a lesson may have charged a task that never left; asked again, it charges
again, since it reads again (`client.ledger`). No other death may cost a site anything.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.summary import read
from simulations.drills.local import Local, Study


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        findings: What is wrong, a sentence each.
        completed: Studies that ended well.
        resumed: How often one had to be resumed.
        charges: Tasks that sites charged in all.
        repeated: Charges beyond one a task.
    """

    findings: tuple[str, ...]
    completed: int
    resumed: int
    charges: int
    repeated: int


def judge(local: Local, studies: Sequence[Study], deaths_in_lessons: int = 0) -> Verdict:
    """Look at every study and every site's books.

    Args:
        local: Where they ran.
        studies: Those that ran.
        deaths_in_lessons: How often a custodian was killed; each may have cost one charge.
    """
    findings = [
        f"study {study.name} did not complete: {study.failures[-1:]}" for study in studies if not study.result
    ]
    charges = repeated = 0
    for site in local.sites:
        verified = local.call("site", "verify", "--policy", local.policy(site), place=site)
        if verified.returncode:
            findings.append(f"{site}: site verify: {verified.stdout} {verified.stderr}")
        books = json.loads(
            local.call("site", "ledger", "--policy", local.policy(site), "--json", place=site).stdout
        )
        charged, committed = (_tasks(books, kind) for kind in ("charge", "commit"))
        charges += charged.total()
        repeated += sum(count - 1 for count in charged.values())
        findings += [f"{site}: {task} was released {n} times" for task, n in committed.items() if n > 1]
        findings += [
            f"{site}: {task} was released and not charged" for task in committed.keys() - charged.keys()
        ]
        for study in studies:
            findings += _hold_against(books, committed, study, site)
    if repeated > deaths_in_lessons:
        findings.append(f"{repeated} tasks were charged again, and {deaths_in_lessons} custodians died")
    return Verdict(
        findings=tuple(findings),
        completed=sum(study.result is not None for study in studies),
        resumed=sum(study.resumed for study in studies),
        charges=charges,
        repeated=repeated,
    )


def _tasks(books: dict[str, list[dict[str, object]]], kind: str) -> "Counter[tuple[object, object]]":
    return Counter((entry["study"], entry["round"]) for entry in books["entries"] if entry["kind"] == kind)


def _hold_against(
    books: dict[str, object], committed: "Counter[tuple[object, object]]", study: Study, site: str
) -> list[str]:
    """What a study's result says of a site, beside the site's own books."""
    if study.result is None:
        return []
    summary = read(Path(str(study.result["results"])) / "summary.json")
    findings = []
    planned = study.local.config.privacy.epsilon
    for own in summary.privacy:
        if own.site == site and own.epsilon > planned:
            findings.append(f"{site}: study {study.name} reports ε = {own.epsilon}, {planned} was planned")
    for line in summary.history:
        if site in line.answered and (study.name, line.round) not in committed:
            findings.append(f"{site}: round {line.round} of {study.name} counts it, and its ledger does not")
    return findings
