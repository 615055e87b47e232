"""FedAUXfdp: the bound that its noise stands on, and what it gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from simulations.baselines import one_shot_heads
from simulations.baselines.one_shot_heads import (
    CERTAINTY_GRADIENT,
    HEAD_GRADIENT,
    fedauxfdp,
    fit_certainty,
    fit_head,
    sensitivity,
)
from simulations.settings import run_settings


def configured(pairs: str = ""):
    return run_settings("heart", [pairs])


def rows(generator: np.random.Generator, count: int, alike: bool) -> np.ndarray:
    drawn = np.ones((count, 3)) if alike else generator.normal(size=(count, 3))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 12),
    size=st.integers(1, 12),
    decay=st.sampled_from([0.01, 0.1, 1.0]),
    alike=st.booleans(),
)
def test_one_record_moves_what_is_fitted_by_no_more_than_the_bound(seed, count, size, decay, alike):
    """Also where the declared size is not the true number, and where all records push the same way."""
    generator = np.random.default_rng(seed)
    ours, public = rows(generator, count, alike), rows(generator, 9, False)
    labels = np.zeros(count, dtype=np.int64) if alike else generator.integers(3, size=count)
    start = generator.normal(size=(3, 3))
    one_less = ours[1:], labels[1:]
    moved = fit_head(ours, labels, size, decay, start) - fit_head(*one_less, size, decay, start)
    assert np.linalg.norm(moved) <= sensitivity(HEAD_GRADIENT, size, decay)
    moved = fit_certainty(ours, public, size, decay) - fit_certainty(one_less[0], public, size, decay)
    assert np.linalg.norm(moved) <= sensitivity(CERTAINTY_GRADIENT, size, decay)


def test_the_bound_of_the_head_is_tight():
    """A single record far from its label moves the head by nearly G/(m·λ) where λ is large."""
    row, nothing, start = np.array([[1.0, 0.0]]), np.empty((0, 2)), np.array([[30.0, 0.0], [0.0, 0.0]])
    alone = fit_head(row, np.array([1]), 1, 10.0, start)
    none = fit_head(nothing, np.empty(0, dtype=np.int64), 1, 10.0, start)
    assert np.linalg.norm(alone - none) > 0.99 * sensitivity(HEAD_GRADIENT, 1, 10.0)


def test_nobodys_records_give_the_teachers_head():
    start = np.array([[1.0, -1.0], [2.0, -2.0]])
    nobody = np.empty((0, 2)), np.empty(0, dtype=np.int64)
    assert fit_head(*nobody, 10, 0.1, start) == pytest.approx(start, abs=1e-6)


def test_it_learns_in_one_round_and_pays_what_it_was_given(bench):
    found = fedauxfdp(configured("privacy.epsilon=8.0 student.weight-decay=0.1"), bench)
    assert found.rounds == 1 and found.scores["auroc"] > 0.8
    assert 7.9 < found.guarantee.epsilon <= 8.0 and found.guarantee.accountant == "gaussian-exact"
    columns = bench.parties[0].units.phi_ND.shape[1] + 1
    assert found.bytes_up == 4 * (2 * columns + columns)
    poor = fedauxfdp(configured("privacy.epsilon=0.01 student.weight-decay=0.1"), bench)
    assert poor.scores["auroc"] < found.scores["auroc"] - 0.05


def test_what_does_not_converge_is_refused_and_not_released(bench, monkeypatch):
    monkeypatch.setattr(one_shot_heads, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match="did not converge"):
        fedauxfdp(configured(), bench)
