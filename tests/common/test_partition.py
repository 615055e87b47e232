"""Every unit goes to exactly one place, the same one for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.partition import by_column, dirichlet, iid, num_units, random_parts, whole_patients
from common.records import Index
from common.seeds import generator


def assert_partition(parts: list[Index], count: int) -> None:
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all(np.all(np.diff(part) > 0) for part in parts)


@given(st.integers(1, 200), st.integers(1, 30), st.integers(0, 5))
def test_iid_is_even(count: int, num_sites: int, seed: int) -> None:
    parts = iid(num_sites, generator(seed, "partition"))(np.zeros(count))
    assert_partition(parts, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    num_sites=st.integers(1, 20),
    alpha=st.sampled_from([0.01, 0.5, 100.0]),
    smallest=st.sampled_from([0.0, 1 / 3, 1.0]),
    seed=st.integers(0, 3),
)
def test_dirichlet_deals_everything_and_keeps_the_minimum(
    labels: list[int], num_sites: int, alpha: float, smallest: float, seed: int
) -> None:
    parts = dirichlet(num_sites, alpha, smallest, generator(seed, "partition"))(np.asarray(labels))
    assert_partition(parts, len(labels))
    assert min(map(len, parts)) >= int(smallest * len(labels) / num_sites)


def test_a_small_alpha_makes_labels_uneven_and_a_large_one_doesnt() -> None:
    labels = np.repeat(np.arange(10), 1000)

    def largest_share(alpha: float) -> float:
        parts = dirichlet(5, alpha, 0.0, generator(0, "partition"))(labels)
        return float(np.mean([np.bincount(labels[part], minlength=10).max() / len(part) for part in parts]))

    assert largest_share(0.1) > 0.3
    assert largest_share(1000.0) < 0.13


def test_the_seed_alone_decides() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 500)

    def dealt(seed: int) -> list[list[int]]:
        return [part.tolist() for part in dirichlet(4, 0.5, 1 / 3, generator(seed, "partition"))(labels)]

    assert dealt(0) == dealt(0) != dealt(1)


def test_by_column_gives_each_site_its_own() -> None:
    parts = by_column(np.asarray(["b", "a", "b", "elsewhere"]), ["a", "b", "c"])
    assert [part.tolist() for part in parts] == [[1], [0, 2], []]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 3))
def test_a_patients_records_stay_together(patients: list[int], num_sites: int, seed: int) -> None:
    ids = np.asarray([f"patient {number}" for number in patients])
    labels = np.zeros(len(ids))
    for deal in (iid(num_sites, generator(seed)), dirichlet(num_sites, 0.5, 1 / 3, generator(seed))):
        parts = whole_patients(deal, labels, ids)
        assert_partition(parts, len(ids))
        seen = [set(ids[part].tolist()) for part in parts]
        assert sum(map(len, seen)) == len(set(ids.tolist())) == num_units(labels, ids)


def test_random_parts_have_the_sizes_asked_for_and_a_rest() -> None:
    parts = random_parts([3, 0, 4], generator(0))(np.zeros(10))
    assert [len(part) for part in parts] == [3, 0, 4, 3]
    assert_partition(parts, 10)
    with pytest.raises(ValueError, match="too few"):
        random_parts([11], generator(0))(np.zeros(10))
