"""The one module that opens private records, by four named readers.

Nothing else in the project may read them (a test enforces it): the private step, the two statistics that a
plan may buy, and preflight's check of the schema. Records are read once, encoded with the proxy's public
constants, and stay in this process's memory.
"""

import hashlib
import hmac
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.noise import PrivateRandomness
from client.private_step import Units
from common.config import RunConfig
from common.datasets import load_private
from common.datasets.files import Complain
from common.datasets.own import check_schema, read_site_records
from common.distillation import Learner
from common.errors import UserError
from common.preprocessing import Preprocessing
from common.proxy import Proxy
from common.records import Cases, Records

log = logging.getLogger("grandrounds.custodian")


@dataclass(frozen=True)
class HoldOut:
    """Who is kept from all training, so that students can be judged on them.

    A keyed hash of the patient decides: neither other patients nor a new version of the data changes it,
    and nobody without the key can tell.

    Attributes:
        key: The site's secret.
        share: Of the patients, between 0 and 1.
    """

    key: bytes
    share: float

    def takes(self, records: Records) -> NDArray[np.bool_]:
        """For each record, whether it is held out: with all of its patient's, or by its own content."""
        return np.array([self._draw(identity) < self.share for identity in _identities(records)], dtype=bool)

    def _draw(self, identity: bytes) -> float:
        return int.from_bytes(hmac.digest(self.key, b"hold-out" + identity, "sha256")[:8], "big") / 2**64


NOBODY_HELD_OUT = HoldOut(b"", 0.0)


def scenario_records(config: RunConfig, site: str, hold_out: HoldOut = NOBODY_HELD_OUT) -> "PrivateRecords":
    """The records that a simulation deals to one of its sites."""
    return PrivateRecords(lambda _: load_private(config, site), hold_out)


def dealt_records(config: RunConfig, site: str) -> Records:
    """What a simulation deals to one of its sites, as it is: for rehearsals (`simulations.rehearsal`)."""
    return load_private(config, site)


def described_records(description: str, site: str, hold_out: HoldOut = NOBODY_HELD_OUT) -> "PrivateRecords":
    """The records that a hospital's own description file names."""
    return PrivateRecords(partial(read_site_records, description, site), hold_out)


class PrivateRecords:
    """A site's records, read lazily and only through the named readers."""

    def __init__(self, read: Callable[[Complain], Records], hold_out: HoldOut = NOBODY_HELD_OUT) -> None:
        """Remember how to read; nothing is opened yet.

        Args:
            read: Reads the records; what it gets is to be told of faults of single ones, which must change
                nothing about the others.
            hold_out: Who is kept from training.
        """
        self._read = read
        self._hold_out = hold_out
        self._parts: tuple[Records, Records] | None = None
        self._encoded: tuple[bytes, Cases, Cases] | None = None
        self._units: dict[tuple[bytes, str, str], Units] = {}

    def for_private_step(self, proxy: Proxy, learner: Learner, unit: str) -> Units:
        """The examples of a private step, as the student sees them."""
        key = (proxy.digest, learner.features.name, unit)
        if key not in self._units:
            cases, _ = self._cases(proxy)
            self._units = {key: _units(cases, learner.phi(cases.x), unit)}
        return self._units[key]

    def for_label_histogram(
        self, proxy: Proxy, unit: str, epsilon: float, randomness: PrivateRandomness
    ) -> tuple[int, ...]:
        """Noisy counts of labels, one record a unit, by the discrete Laplace mechanism (L1 sensitivity 1)."""
        cases, _ = self._cases(proxy)
        taken = _units(cases, torch.zeros(len(cases), 1), unit).sample(randomness, 1.0)
        counts_C = np.bincount(cases.y[taken], minlength=len(proxy.preprocessing.classes))
        return _noisy(counts_C, epsilon, randomness)

    def for_hold_out_accuracy(
        self, proxy: Proxy, learner: Learner, unit: str, epsilon: float, randomness: PrivateRandomness
    ) -> tuple[int, ...]:
        """Noisy counts of right and wrong judgements on those held out, one record a unit (sensitivity 1)."""
        _, cases = self._cases(proxy)
        units = _units(cases, learner.phi(cases.x), unit)
        taken = units.sample(randomness, 1.0)
        right = int((learner.logits(units.phi_ND[taken]).argmax(axis=1) == cases.y[taken]).sum())
        return _noisy(np.array([right, len(taken) - right]), epsilon, randomness)

    def for_schema_check(self, preprocessings: Sequence[Preprocessing]) -> list[str]:
        """Complaints about records, columns and types, if they can be read at all; they quote no value.

        Raises:
            UserError: if the records can't be read as their description says.
        """
        complaints: list[str] = []
        records = self._read(complaints.append)
        if len(records) == 0 and not preprocessings:
            complaints.append("there are no records")
        return complaints + [fault for one in preprocessings for fault in check_schema(records, one)]

    def _cases(self, proxy: Proxy) -> tuple[Cases, Cases]:
        """The labelled cases to train on, and those that are held out."""
        if self._encoded is None or self._encoded[0] != proxy.digest:
            if self._parts is None:
                # Whether one patient's record is broken must not show in the others' lesson.
                records = self._read(_log_fault)
                usable = records.target != ""
                if records.patients is not None:
                    # Two records without an id may be one patient or two: they can be no unit of either kind.
                    usable &= records.patients != ""
                records = records.take(np.flatnonzero(usable))
                held = self._hold_out.takes(records)
                self._parts = records.take(~held), records.take(held)
            kept, held_out = (_encode(proxy.preprocessing, part) for part in self._parts)
            self._encoded = proxy.digest, kept, held_out
            self._units = {}
        return self._encoded[1:]


class Nobody(PrivateRecords):
    """No records: what a lesson is held over that failed over the site's own."""

    def __init__(self) -> None:
        """There is nothing to read."""
        super().__init__(
            lambda _: Records(columns={}, target=np.empty(0, dtype=str), patients=None, groups={})
        )

    def _cases(self, proxy: Proxy) -> tuple[Cases, Cases]:
        x = np.empty((0, *proxy.preprocessing.case_shape), dtype=np.float32)
        nobody = np.empty(0, dtype=np.int64)
        nothing = Cases(x=x, y=nobody, patients=nobody, groups={})
        return nothing, nothing


def _log_fault(complaint: str) -> None:
    log.warning("%s; what can't be read counts as missing, a record without a label is left out", complaint)


def _encode(preprocessing: Preprocessing, records: Records) -> Cases:
    cases = preprocessing.encode(records)
    # A label that the proxy's classes don't know can teach nothing here.
    return cases.take(np.flatnonzero(cases.y >= 0))


def _units(cases: Cases, phi_ND: Tensor, unit: str) -> Units:
    if unit == "patient" and cases.patients is None:
        raise UserError("the unit is the patient, and no column says which records are of the same one")
    return Units.group(phi_ND, torch.from_numpy(cases.y), cases.patients if unit == "patient" else None)


def _noisy(counts: NDArray[np.int64], epsilon: float, randomness: PrivateRandomness) -> tuple[int, ...]:
    return tuple((counts + randomness.discrete_laplace(len(counts), epsilon)).tolist())


def _identities(records: Records) -> Iterator[bytes]:
    if records.patients is not None:
        yield from (str(patient).encode() for patient in records.patients)
        return
    for row in range(len(records)):
        content = hashlib.sha256(str(records.target[row]).encode())
        for name in sorted(records.columns):
            value = records.columns[name][row]
            content.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
        yield content.digest()
