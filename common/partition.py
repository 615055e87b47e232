"""Dealing one pooled table to sites and to public parts, as simulations need it.

Real federations come with their sites. Where only one pooled table is at hand, its rows are dealt: by a
column that says where each was seen, evenly at random (IID), or with uneven labels: each class is spread over
the sites in proportions drawn from a Dirichlet distribution (Hsu, Qi, Brown 2019, arXiv:1909.06335; small α
is uneven). The generators come from `common.seeds`, so that every deal is public and repeatable.

What is dealt are *units*: where records name their patient, all records of one patient go the same way, since
a patient at two sites, or in both the private and the public part, would be protected in neither.

Shape legend: N units or records, S sites.
"""

from collections.abc import Callable, Sequence

import numpy as np

from common.records import AnyArray, Index

Deal = Callable[[AnyArray], list[Index]]
"""Takes the labels (N,) of the units to be dealt; returns a rising index array for each site or part."""


def by_column(values_N: AnyArray, names: Sequence[str]) -> list[Index]:
    """Give each site the records that name it; records that name another go nowhere."""
    return [np.flatnonzero(values_N == name) for name in names]


def iid(num_sites: int, generator: np.random.Generator) -> Deal:
    """Deal evenly at random; sizes differ by at most one."""

    def deal(labels_N: AnyArray) -> list[Index]:
        return [np.sort(part) for part in np.array_split(generator.permutation(len(labels_N)), num_sites)]

    return deal


def dirichlet(num_sites: int, alpha: float, smallest: float, generator: np.random.Generator) -> Deal:
    """Deal each class in proportions drawn from Dirichlet(α, …, α).

    A site that comes out too small is filled up at random from whichever site is largest then.

    Args:
        num_sites: S.
        alpha: Concentration: towards 0 a class sits at one site, towards ∞ the deal is IID.
        smallest: Least size of a site as a share of an even deal's, between 0 and 1.
        generator: Public randomness.
    """

    def deal(labels_N: AnyArray) -> list[Index]:
        site_N = np.empty(len(labels_N), dtype=np.intp)
        for label in np.unique(labels_N):
            of_label = generator.permutation(np.flatnonzero(labels_N == label))
            cuts = np.cumsum(generator.dirichlet(np.full(num_sites, alpha)))[:-1] * len(of_label)
            for site, part in enumerate(np.split(of_label, np.round(cuts).astype(np.intp))):
                site_N[part] = site
        _fill_up(site_N, num_sites, int(smallest * len(labels_N) / num_sites), generator)
        return [np.flatnonzero(site_N == site) for site in range(num_sites)]

    return deal


def _fill_up(site_N: Index, num_sites: int, minimum: int, generator: np.random.Generator) -> None:
    """Move units in place until every site has the minimum, which is at most N / S."""
    sizes = np.bincount(site_N, minlength=num_sites)
    for site in range(num_sites):
        while sizes[site] < minimum:
            largest = int(np.argmax(sizes))
            count = min(minimum - int(sizes[site]), int(sizes[largest]) - minimum)
            moved = generator.choice(np.flatnonzero(site_N == largest), size=count, replace=False)
            site_N[moved] = site
            sizes[largest] -= count
            sizes[site] += count


def random_parts(sizes: Sequence[int], generator: np.random.Generator) -> Deal:
    """Deal disjoint random parts of these sizes, and one last part with all the rest."""

    def deal(labels_N: AnyArray) -> list[Index]:
        if sum(sizes) > len(labels_N):
            raise ValueError(f"{len(labels_N)} units are too few for parts of {list(sizes)}")
        parts = np.split(generator.permutation(len(labels_N)), np.cumsum(sizes))
        return [np.sort(part) for part in parts]

    return deal


def whole_patients(deal: Deal, labels_N: AnyArray, patients_N: AnyArray | None) -> list[Index]:
    """Deal records so that all those of one patient go the same way.

    Args:
        deal: What deals units.
        labels_N: Label of each record; a patient counts with that of the first record.
        patients_N: Patient ids, or None where each record is its own unit.

    Returns:
        A rising array of record positions for each site or part.
    """
    if patients_N is None:
        return deal(labels_N)
    _, first, unit_N = np.unique(patients_N, return_index=True, return_inverse=True)
    return [np.flatnonzero(np.isin(unit_N, units)) for units in deal(labels_N[first])]


def num_units(labels_N: AnyArray, patients_N: AnyArray | None) -> int:
    """Return how many units there are to deal."""
    return len(labels_N) if patients_N is None else len(np.unique(patients_N))
