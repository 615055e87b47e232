"""The one module that opens private records, by three named readers.

Nothing else in the project may read them (a test enforces it): the private step, the statistics that a plan buys, and preflight's
check of the schema. Records are read once, encoded with the proxy's public constants, and stay in this process's memory.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from client.noise import PrivateRandomness
from client.private_step import Units
from common.config import RunConfig
from common.datasets import load_private
from common.datasets.own import check_schema, read_site_records
from common.distillation import Learner
from common.preprocessing import Preprocessing
from common.proxy import Proxy
from common.records import Cases, Records


def scenario_records(config: RunConfig, site: str) -> "PrivateRecords":
    """The records that a simulation deals to one of its sites."""
    return PrivateRecords(lambda: load_private(config, site))


def described_records(description: str, site: str) -> "PrivateRecords":
    """The records that a hospital's own description file names."""
    return PrivateRecords(lambda: read_site_records(description, site))


class PrivateRecords:
    """A site's records, read lazily and only through the named readers."""

    def __init__(self, read: Callable[[], Records]) -> None:
        """Remember how to read; nothing is opened yet."""
        self._read = read
        self._records: Records | None = None
        self._encoded: tuple[bytes, Cases] | None = None
        self._units: dict[tuple[bytes, str, str], Units] = {}

    def for_private_step(self, proxy: Proxy, learner: Learner, unit: str) -> Units:
        """The examples of a private step, as the student sees them."""
        key = (proxy.digest, learner.features.name, unit)
        if key not in self._units:
            cases = self._cases(proxy)
            patients = cases.patients if unit == "patient" else None
            self._units = {key: Units.group(learner.phi(cases.x), torch.from_numpy(cases.y), patients)}
        return self._units[key]

    def for_label_histogram(
        self, proxy: Proxy, unit: str, epsilon: float, randomness: PrivateRandomness
    ) -> NDArray[np.int64]:
        """Noisy counts of labels, one record a unit, by the discrete Laplace mechanism (L1 sensitivity 1)."""
        cases = self._cases(proxy)
        patients = cases.patients if unit == "patient" else None
        units = Units.group(torch.zeros(len(cases.y), 1), torch.from_numpy(cases.y), patients)
        classes = len(proxy.preprocessing.classes)
        counts_C = np.bincount(cases.y[units.sample(randomness, 1.0)], minlength=classes)
        return counts_C + randomness.discrete_laplace(classes, epsilon)

    def for_schema_check(self, preprocessing: Preprocessing) -> list[str]:
        """Complaints about columns and types; they hold no value of any record."""
        return check_schema(self._read(), preprocessing)

    def _cases(self, proxy: Proxy) -> Cases:
        if self._encoded is None or self._encoded[0] != proxy.digest:
            if self._records is None:
                self._records = self._read()
            labelled = self._records.take(np.flatnonzero(self._records.target != ""))
            cases = proxy.preprocessing.encode(labelled)
            # A label that the proxy's classes don't know can teach nothing here.
            self._encoded = (proxy.digest, cases.take(np.flatnonzero(cases.y >= 0)))
            self._units = {}
        return self._encoded[1]
