"""The books: the ledger checked in full, and held against the log of what was sent."""

from dataclasses import replace
from hashlib import sha256

from client.ledger import Ledger, Verdict
from client.release_log import ReleaseLog
from common.errors import UserError


def verify(ledger: Ledger, log: ReleaseLog) -> Verdict:
    """Check that the ledger is sound and that nothing was sent which it doesn't hold."""
    verdict = ledger.verify()
    if verdict.findings:
        return verdict
    try:
        held, logged = _held(ledger), list(log.read())
    except UserError as error:  # a line that isn't the log's own
        return replace(verdict, findings=(f"{error}.",))
    findings = tuple(
        f"{log.path}: on {line.when} a release of study {line.study}, round {line.round}, was sent "
        "that the ledger doesn't hold."
        for line in logged
        if (line.study, line.round, line.sha256) not in held
    )
    sent = {(line.study, line.round) for line in logged}
    words = f"Releases in the ledger: {len(held)}; sent, by the log of releases: {len(sent)}."
    return replace(verdict, findings=findings, guarantee=f"{verdict.guarantee} {words}")


def _held(ledger: Ledger) -> set[tuple[str, int, str]]:
    held = set()
    for entry in ledger.entries():
        if entry.kind == "commit":
            study, round_number = entry.body["study"], entry.body["round"]
            release = ledger.committed(study, round_number, bytes.fromhex(entry.body["task"]))
            held.add((study, round_number, sha256(release or b"").hexdigest()))
    return held
