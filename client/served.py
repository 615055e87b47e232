"""A hospital's site, opened from its policy: the counterpart of `client.simulated`.

Everything lies in the policy's `state` folder, which one custodian at a time may serve from:

    ledger.db            the ledger (`client.ledger`)
    proxies/             public sets, each under its digest
    asked/               plans that wait for a person (`client.approval`)
    releases.jsonl       what was sent, and when (`client.release_log`)
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
from client.custodian import MOST_PROXY_BYTES, Custodian
from client.ledger import Ledger
from client.policy import ServedPolicy, require_own, require_secret
from client.release_log import ReleaseLog
from common.datasets.description import read_description
from common.errors import UserError
from common.proxy import Proxy

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
        UserError: if the state folder is in use or not ours alone, the ledger isn't sound, or the data don't name the
            unit that the policy promises.
    """
    state = Path(policy.state)
    require_own(state / LEDGER, "the site's ledger")
    require_unit(policy)
    with _locked(state / "lock"), open_ledger(policy) as ledger:
        yield ServedSite(
            policy=policy,
            custodian=Custodian(
                policy=policy,
                records=partial(_records, policy),
                ledger=ledger,
                proxies=state / "proxies",
            ),
            ledger=ledger,
            releases=ReleaseLog(state / "releases.jsonl"),
            asked=AskedPlans(state / "asked"),
        )


def open_ledger(policy: ServedPolicy) -> Ledger:
    """Open the site's ledger, to serve or to read it.

    Raises:
        UserError: if its key is missing or not ours alone, or the ledger isn't sound.
    """
    key = Path(policy.key)
    require_secret(key)
    return Ledger.open(Path(policy.state) / LEDGER, key.read_bytes(), anchor=Path(policy.anchor))


def known_proxies(policy: ServedPolicy) -> list[Proxy]:
    """The public sets that are kept here.

    Raises:
        UserError: naming one that is damaged.
    """
    proxies = []
    for path in sorted((Path(policy.state) / "proxies").glob("*.safetensors")):
        try:
            proxies.append(Proxy.load(path, MOST_PROXY_BYTES))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}; remove it, and it will be sent again") from None
    return proxies


def require_unit(policy: ServedPolicy) -> None:
    """Refuse to promise patients a protection that the data description can't give: it must say who they are.

    Raises:
        UserError: if the unit is the patient and no column names one.
    """
    description = Path(policy.data.description)
    if policy.data.unit == "patient" and not read_description(description).patient:
        raise UserError(f'{description}: the policy says unit = "patient", and no column is named as `patient`')


def _records(policy: ServedPolicy) -> "PrivateRecords":
    from client.private_data import described_records

    return described_records(policy.data.description, policy.site)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent}: another custodian serves from here") from None
        yield
