"""Cases before and after encoding.

`Records` are what a hospital has: named columns in their own units, with gaps. `Cases` are what a model sees:
one float array and class numbers. The only way from one to the other is `common.preprocessing`, whose
constants come from the public proxy, so that nothing about a site's own distribution can slip into how its
records look.

Shape legend: N cases, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
Index = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """Raw records, one row a case.

    Attributes:
        columns: Tabular: name → (N,) float64 with NaN for missing, or (N,) str with "" for missing. Images:
            one (N, C, H, W) array of uint8 or float32. Texts: (N,) objects, each a str, since in an array of
            str the longest would set the size of all.
        target: (N,) str labels; "" is unlabelled.
        patients: (N,) str patient ids, or None where each record is its own unit of privacy.
        groups: (N,) str subgroup values such as sex or age band: for audits of fairness, never model inputs.
    """

    columns: Mapping[str, AnyArray]
    target: AnyArray
    patients: AnyArray | None
    groups: Mapping[str, AnyArray]

    def __post_init__(self) -> None:
        """Refuse columns of unequal length."""
        others = [] if self.patients is None else [self.patients]
        if any(
            len(values) != len(self) for values in (*self.columns.values(), *self.groups.values(), *others)
        ):
            raise ValueError("the columns of Records differ in length")

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.target)

    def take(self, index: npt.ArrayLike) -> "Records":
        """Return the records at these positions (or where this mask is true)."""
        at = np.asarray(index)
        return Records(
            columns={name: values[at] for name, values in self.columns.items()},
            target=self.target[at],
            patients=None if self.patients is None else self.patients[at],
            groups={name: values[at] for name, values in self.groups.items()},
        )


@dataclass(frozen=True)
class Cases:
    """Encoded cases.

    Attributes:
        x: (N, *case_shape) float32.
        y: (N,) int64 class numbers; -1 is unlabelled.
        patients: (N,) int64 codes that say which cases share a patient, or None.
        groups: As in `Records`.
    """

    x: Float32s
    y: Ints
    patients: Ints | None
    groups: Mapping[str, AnyArray]

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self.y)

    def take(self, index: npt.ArrayLike) -> "Cases":
        """Return the cases at these positions (or where this mask is true)."""
        at = np.asarray(index)
        return Cases(
            x=self.x[at],
            y=self.y[at],
            patients=None if self.patients is None else self.patients[at],
            groups={name: values[at] for name, values in self.groups.items()},
        )


def concatenate(parts: Sequence[Records]) -> Records:
    """Put records with the same columns under one another, in the order given."""
    first = parts[0]
    return Records(
        columns={name: np.concatenate([part.columns[name] for part in parts]) for name in first.columns},
        target=np.concatenate([part.target for part in parts]),
        patients=None if first.patients is None else np.concatenate([_patients(part) for part in parts]),
        groups={name: np.concatenate([part.groups[name] for part in parts]) for name in first.groups},
    )


def bands(values: Floats, edges: Sequence[float]) -> AnyArray:
    """Name the band each value lies in, such as "45 to 60"; a missing value is "unknown".

    Args:
        values: (N,) numbers.
        edges: Rising edges; a band takes in its lower edge.

    Returns:
        (N,) str.
    """
    shown = [f"{edge:g}" for edge in edges]
    names = [f"under {shown[0]}", *map(" to ".join, pairwise(shown)), f"{shown[-1]} and over"]
    band = np.asarray(names)[np.searchsorted(np.asarray(edges), np.nan_to_num(values), side="right")]
    return np.where(np.isnan(values), "unknown", band)


def _patients(part: Records) -> AnyArray:
    if part.patients is None:
        raise ValueError("some of the records have patient ids and some have none")
    return part.patients
