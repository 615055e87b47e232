"""The ensemble against naive references, and what hostile sites can and can't do to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import Aggregation
from server.aggregation import RULES, Contribution, aggregate

SETTINGS = Aggregation()


@st.composite
def ensembles(draw) -> list[Contribution]:
    sites, cases, classes = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return [
        Contribution(
            site=f"site-{k}",
            logits_PC=rng.normal(size=(cases, classes)).astype(np.float32),
            weight=float(rng.integers(1, 500)),
            histogram_C=tuple(int(n) for n in rng.integers(-3, 100, classes)),
        )
        for k in range(sites)
    ]


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None)
@given(ensemble=ensembles(), seed=st.integers(0, 1000))
def test_the_order_of_answers_does_not_matter_to_the_bit(rule, ensemble, seed):
    shuffled = [ensemble[i] for i in np.random.default_rng(seed).permutation(len(ensemble))]
    assert (aggregate(rule, ensemble, SETTINGS) == aggregate(rule, shuffled, SETTINGS)).all()


@given(ensemble=ensembles())
def test_mean_is_weighted_by_declared_sizes(ensemble):
    weights = np.array([one.weight for one in ensemble])
    naive = np.average([one.logits_PC for one in ensemble], axis=0, weights=weights)
    np.testing.assert_allclose(aggregate("mean", ensemble, SETTINGS), naive, rtol=1e-5, atol=1e-6)


@given(ensemble=ensembles())
def test_class_weighted_asks_each_class_those_who_have_seen_it(ensemble):
    counts_KC = np.maximum([one.histogram_C for one in ensemble], 0.5)
    for k, one in enumerate(ensemble):
        counts_KC[k] *= min(1.0, one.weight / counts_KC[k].sum())
    naive = np.zeros_like(ensemble[0].logits_PC, dtype=np.float64)
    for k, one in enumerate(ensemble):
        exp = np.exp(one.logits_PC.astype(np.float64))
        naive += counts_KC[k] / counts_KC.sum(axis=0) * np.log(exp / exp.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(aggregate("class-weighted", ensemble, SETTINGS), naive, rtol=1e-5, atol=1e-6)


@given(ensemble=ensembles().filter(lambda e: len(e) >= 5), size=st.floats(1e3, 1e6))
def test_one_hostile_site_cannot_carry_the_trimmed_mean_away(ensemble, size):
    hostile = Contribution("zz", np.full_like(ensemble[0].logits_PC, size), 1e9)
    honest = np.stack([one.logits_PC for one in ensemble])
    shaken = aggregate("trimmed-mean", [*ensemble, hostile], SETTINGS)
    assert (shaken <= honest.max(axis=0) + 1e-6).all() and (shaken >= honest.min(axis=0) - 1e-6).all()


def test_a_forged_histogram_gives_no_more_say_than_the_declared_size():
    honest = [
        Contribution(f"s{k}", 3 * np.eye(3, dtype=np.float32), 1000.0, (300, 300, 400)) for k in range(4)
    ]
    forged = Contribution("z", np.tile(np.float32([9, 0, 0]), (3, 1)), 50.0, (2**31 - 1,) * 3)
    ensemble_PC = aggregate("class-weighted", [*honest, forged], SETTINGS)
    assert (ensemble_PC.argmax(axis=1) == [0, 1, 2]).all()


def test_an_empty_ensemble_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        aggregate("mean", [], SETTINGS)
