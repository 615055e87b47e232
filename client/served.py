"""A hospital's site, opened from its policy: the counterpart of `client.simulated`.

Everything lies in the policy's `state` folder, which one custodian at a time may serve from:

    ledger.db            the ledger (`client.ledger`)
    proxies/             public sets, each under its digest
    asked/               plans that wait for a person (`client.approval`)
    releases.jsonl       what was sent, and when (`client.release_log`)
    ca.crt, courier.crt  copies of what the courier trusts and shows (`client.joining`)
    metrics.prom         what may be watched while a custodian serves (`client.site_metrics`)
    student.safetensors  the last run's final student
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from client.approval import AskedPlans
from client.custodian import Custodian
from client.ledger import Ledger
from client.policy import ServedPolicy, require_own, require_secret
from client.release_log import ReleaseLog
from client.shelf import shelf_of
from common.accounting import Unit
from common.datasets.description import Description, read_description
from common.errors import UserError
from common.kit import AUTHORITY, CERTIFICATE

if TYPE_CHECKING:  # torch is loaded with the first task, not before
    from client.private_data import PrivateRecords

LEDGER = "ledger.db"


@dataclass(frozen=True)
class ServedSite:
    """A site that is open for questions."""

    policy: ServedPolicy
    custodian: Custodian
    ledger: Ledger
    releases: ReleaseLog
    asked: AskedPlans


@contextmanager
def open_site(policy: ServedPolicy) -> Iterator[ServedSite]:
    """Open a site to serve it; no other process can, meanwhile.

    Raises:
        UserError: if the state folder is in use or not ours alone, the ledger isn't sound, or the data
            don't name the unit that the policy promises.
    """
    state = Path(policy.state)
    require_own(state / LEDGER, "the site's ledger")
    with _locked(state / "lock"), open_ledger(policy) as ledger:
        yield site_of(policy, ledger)


def site_of(policy: ServedPolicy, ledger: Ledger) -> ServedSite:
    """Put a site together around its ledger.

    Raises:
        UserError: if the data or the ledger don't know the unit that the policy promises.
    """
    require_ledgers_unit(policy, ledger)
    columns = frozenset(feature.name for feature in require_unit(policy).features)
    custodian = Custodian(
        policy=policy,
        open_records=partial(_records, policy),
        ledger=ledger,
        shelf=shelf_of(policy),
        columns=columns,
    )
    return ServedSite(policy, custodian, ledger, release_log(policy), asked_plans(policy))


def open_ledger(policy: ServedPolicy) -> Ledger:
    """Open the site's ledger, to serve or to read it.

    Raises:
        UserError: if its key is missing or not ours alone, or the ledger isn't sound.
    """
    key = Path(policy.key)
    require_secret(key)
    return Ledger.open(Path(policy.state) / LEDGER, key.read_bytes(), anchor=Path(policy.anchor))


def certificates(policy: ServedPolicy) -> dict[str, Path]:
    """Where the certificates lie that a site can't do without, by whose they are.

    A site that joined no federation by a kit has none of the first two.
    """
    state, own = Path(policy.state), policy.service.certificate
    brought = {"courier": state / CERTIFICATE, "authority": state / AUTHORITY}
    return brought | ({"custodian": Path(own)} if own else {})


def asked_plans(policy: ServedPolicy) -> AskedPlans:
    """Plans that wait for a person."""
    return AskedPlans(Path(policy.state) / "asked")


def release_log(policy: ServedPolicy) -> ReleaseLog:
    """The log of what was sent."""
    return ReleaseLog(Path(policy.state) / "releases.jsonl")


def require_unit(policy: ServedPolicy) -> Description:
    """Read the data description; if patients are promised protection, it must say who they are.

    Raises:
        UserError: if the unit is the patient and no column names one.
    """
    path = Path(policy.data.description)
    description = read_description(path)
    require_patients(path, description, policy.data.unit)
    return description


def require_patients(path: Path, description: Description, unit: Unit) -> None:
    """Hold a data description against the unit of privacy.

    Raises:
        UserError: if the unit is the patient and no column names one.
    """
    if unit == "patient" and not description.patient:
        raise UserError(
            f"{path}: the unit is the patient, and no column is named as `patient` (docs/own-data.md)"
        )


def require_ledgers_unit(policy: ServedPolicy, ledger: Ledger) -> None:
    """What was counted by patient must never go on by record, nor the other way.

    Raises:
        UserError: if policy and ledger differ.
    """
    if ledger.unit != policy.data.unit:
        raise UserError(
            f"data.unit is {policy.data.unit}, and the ledger counts by {ledger.unit}: it must stay so"
        )


def _records(policy: ServedPolicy) -> "PrivateRecords":
    from client.private_data import HoldOut, described_records

    hold_out = HoldOut(Path(policy.key).read_bytes(), policy.data.hold_out)
    return described_records(policy.data.description, policy.site, hold_out)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent}: another custodian serves from here") from None
        yield
