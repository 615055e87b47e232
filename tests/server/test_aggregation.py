"""The ensemble against naive references, and what hostile sites can and can't do to it."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import Aggregation
from server.aggregation import (
    GRID,
    RULES,
    Contribution,
    Moment,
    OrderFreeSum,
    aggregate,
    open_ensemble,
)
from server.robust_rules import MOST_OUTLYING
from server.stacking import Jury

ROBUST = ("median", "trimmed-mean", "geometric-median", "outlier-weights")


@st.composite
def ensembles(draw, fewest: int = 1, most: int = 7) -> list[Contribution]:
    sites, cases, classes = draw(st.integers(fewest, most)), draw(st.integers(1, 5)), draw(st.integers(2, 4))
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


def combine(rule: str, said: list[Contribution]) -> np.ndarray:
    return aggregate(rule, said, Moment(Aggregation(), sum(one.weight for one in said))).logits_PC


def moment_of(ensemble: list[Contribution]) -> Moment:
    """A moment with a jury of five cases, who hear what is said of the cases in their own way."""
    cases, classes = ensemble[0].logits_PC.shape
    rng = np.random.default_rng(cases)
    jury = Jury(rng.normal(size=(5, cases)), rng.integers(0, classes, 5))
    return Moment(Aggregation(), 5000.0, rng.normal(size=(cases, classes)), jury)


def equally_weighted(ensemble: list[Contribution]) -> list[Contribution]:
    return [Contribution(one.site, one.logits_PC, 7.0) for one in ensemble]


def stack(ensemble: list[Contribution]) -> np.ndarray:
    return np.stack([one.logits_PC for one in ensemble]).astype(np.float64)


@pytest.mark.parametrize("rule", RULES)
@given(ensemble=ensembles(), seed=st.integers(0, 1000))
def test_the_order_of_answers_does_not_matter_to_the_bit(rule, ensemble, seed):
    shuffled = [ensemble[i] for i in np.random.default_rng(seed).permutation(len(ensemble))]
    moment = moment_of(ensemble)
    one, other = aggregate(rule, ensemble, moment), aggregate(rule, shuffled, moment)
    assert (one.logits_PC == other.logits_PC).all()
    assert one.outlying == other.outlying


@given(ensemble=ensembles())
def test_mean_is_weighted_by_declared_sizes(ensemble):
    weights = np.array([one.weight for one in ensemble])
    naive = np.average([one.logits_PC for one in ensemble], axis=0, weights=weights)
    np.testing.assert_allclose(combine("mean", ensemble), naive, rtol=1e-5, atol=1e-6)


@given(ensemble=ensembles())
def test_class_weighted_asks_each_class_those_who_have_seen_it(ensemble):
    counts_KC = np.maximum([one.histogram_C for one in ensemble], 0.5)
    for k, one in enumerate(ensemble):
        counts_KC[k] *= min(1.0, one.weight / counts_KC[k].sum())
    naive = np.zeros_like(ensemble[0].logits_PC, dtype=np.float64)
    for k, one in enumerate(ensemble):
        exp = np.exp(one.logits_PC.astype(np.float64))
        naive += counts_KC[k] / counts_KC.sum(axis=0) * np.log(exp / exp.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(combine("class-weighted", ensemble), naive, rtol=1e-5, atol=1e-6)


def test_a_forged_histogram_gives_no_more_say_than_the_declared_size():
    honest = [
        Contribution(f"s{k}", 3 * np.eye(3, dtype=np.float32), 1000.0, (300, 300, 400)) for k in range(4)
    ]
    forged = Contribution("z", np.tile(np.float32([9, 0, 0]), (3, 1)), 50.0, (2**31 - 1,) * 3)
    ensemble_PC = combine("class-weighted", [*honest, forged])
    assert (ensemble_PC.argmax(axis=1) == [0, 1, 2]).all()


@given(ensemble=ensembles())
def test_the_median_of_equal_sites_is_numpys_centred(ensemble):
    naive = np.median(stack(ensemble), axis=0)
    naive -= naive.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(combine("median", equally_weighted(ensemble)), naive, atol=1e-9)


@given(ensemble=ensembles(most=4), seed=st.integers(0, 99))
def test_a_site_counts_in_the_median_as_often_as_its_declared_size(ensemble, seed):
    sizes = np.random.default_rng(seed).integers(1, 4, len(ensemble))
    pairs = list(zip(ensemble, sizes, strict=True))
    weighted = [Contribution(one.site, one.logits_PC, float(size)) for one, size in pairs]
    repeated = [
        Contribution(f"{one.site}-{i}", one.logits_PC, 1.0) for one, size in pairs for i in range(size)
    ]
    np.testing.assert_allclose(combine("median", weighted), combine("median", repeated), atol=1e-9)


@given(ensemble=ensembles())
def test_the_trimmed_mean_of_equal_sites_cuts_its_share_at_each_end(ensemble):
    ordered, sites = np.sort(stack(ensemble), axis=0), len(ensemble)
    cut = min(-(-sites // 5), (sites - 1) // 2)
    naive = ordered[cut : sites - cut].mean(axis=0)
    np.testing.assert_allclose(combine("trimmed-mean", equally_weighted(ensemble)), naive, atol=1e-9)


@given(ensemble=ensembles())
def test_the_geometric_median_has_the_least_sum_of_distances(ensemble):
    def distances(point_PC: np.ndarray) -> float:
        return sum(one.weight * float(np.linalg.norm(one.logits_PC - point_PC)) for one in ensemble)

    found = distances(combine("geometric-median", ensemble))
    candidates = [*stack(ensemble), combine("mean", ensemble)]
    assert found <= min(map(distances, candidates)) * (1 + 1e-3) + 1e-3


@pytest.mark.parametrize("rule", ["trimmed-mean", "median"])
@given(ensemble=ensembles(fewest=5), size=st.floats(1e3, 1e6))
def test_a_hostile_site_cannot_carry_a_value_beyond_the_honest_ones(rule, ensemble, size):
    weight = 0.2 * sum(one.weight for one in ensemble)  # a sixth of all
    values_PC = np.zeros_like(ensemble[0].logits_PC)
    values_PC[:, 0] = size
    shaken_PC = combine(rule, [*ensemble, Contribution("zz", values_PC, weight)])
    honest = stack(ensemble)
    lowest_PC, highest_PC = honest.min(axis=0), honest.max(axis=0)
    if rule == "median":  # its rows are centred again
        middle = lowest_PC.mean(axis=1, keepdims=True), highest_PC.mean(axis=1, keepdims=True)
        lowest_PC, highest_PC = lowest_PC - middle[1], highest_PC - middle[0]
    assert (shaken_PC <= highest_PC + 1e-6).all() and (shaken_PC >= lowest_PC - 1e-6).all()


@given(ensemble=ensembles(), share=st.floats(0.05, 0.4), size=st.floats(1e2, 1e4))
def test_hostile_sites_carry_the_geometric_median_only_so_far(ensemble, share, size):
    """With a share α of all weight: 2(1 − α)/(1 − 2α) radii of the honest sites from their centre."""
    weight = share / (1 - share) * sum(one.weight for one in ensemble)
    hostile = Contribution("zz", np.full_like(ensemble[0].logits_PC, size), weight)
    centre_PC = combine("mean", ensemble)
    radius = max(float(np.linalg.norm(one - centre_PC)) for one in stack(ensemble))
    shaken_PC = combine("geometric-median", [*ensemble, hostile])
    unfinished = 1e-3 * float(np.linalg.norm(hostile.logits_PC))
    moved = float(np.linalg.norm(shaken_PC - centre_PC))
    assert moved <= 2 * (1 - share) / (1 - 2 * share) * radius + unfinished


@pytest.mark.parametrize("rule", [*ROBUST, "mean"])
@given(ensemble=ensembles(), scale=st.sampled_from([0.125, 2.0, 64.0]))
def test_rules_follow_the_scale(rule, ensemble, scale):
    larger = [Contribution(one.site, np.float32(scale) * one.logits_PC, one.weight) for one in ensemble]
    expected_PC = scale * combine(rule, ensemble)
    np.testing.assert_allclose(combine(rule, larger), expected_PC, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("rule", ROBUST)
def test_pieces_make_the_same_as_the_whole(rule, monkeypatch):
    rng = np.random.default_rng(3)
    said = [Contribution(f"s{k}", rng.normal(size=(50, 3)).astype(np.float32), 1.0 + k) for k in range(5)]
    whole_PC = combine(rule, said)
    monkeypatch.setattr("server.robust_rules.PIECE_BYTES", 8 * 3 * 5 * 7)  # seven cases at a time
    np.testing.assert_allclose(combine(rule, said), whole_PC, atol=1e-9)


@given(ensemble=ensembles(), seed=st.integers(0, 1000))
def test_an_order_free_sum_is_exact_on_its_grid(ensemble, seed):
    factors = np.random.default_rng(seed).random(len(ensemble)) / len(ensemble)
    terms = [(float(factor), one.logits_PC) for factor, one in zip(factors, ensemble, strict=True)]
    total = OrderFreeSum()
    for factor, values in terms:
        total.add(factor, values)
    naive = sum(values.astype(np.float64) * factor for factor, values in terms)
    assert np.abs(total.total - naive).max() <= len(terms) * GRID / 2 + 1e-15
    steps = total.total / GRID
    assert (steps == np.rint(steps)).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_order_does_not_matter_for_values_of_any_size(seed):
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1, 1], (50, 20, 3))
    said = (signs * 10.0 ** rng.uniform(-9, 7, signs.shape)).astype(np.float32)
    one, other = OrderFreeSum(), OrderFreeSum()
    for values in said:
        one.add(1 / 50, values)
    for k in rng.permutation(50):
        other.add(1 / 50, said[k])
    assert (one.total == other.total).all()


def test_what_is_too_large_is_cut_and_what_is_no_number_is_refused():
    total = OrderFreeSum()
    with np.errstate(over="ignore"):
        total.add(0.5, np.float32([3e38, -np.inf, 1.0]))
    assert (total.total == [2.0**17, -(2.0**17), 0.5]).all()
    with pytest.raises(ValueError, match="no number"):
        total.add(0.5, np.float32([np.nan, 0.0, 0.0]))


@pytest.mark.parametrize("rule", ["mean", "class-weighted"])
def test_a_stream_holds_no_release(rule):
    stream = open_ensemble(rule, Moment(Aggregation(), 2.0))
    values_PC = np.zeros((4, 2), np.float32)
    kept = weakref.ref(values_PC)
    stream.hear(Contribution("s", values_PC, 1.0))
    del values_PC
    assert kept() is None
    assert stream.combined().logits_PC.shape == (4, 2)


@given(ensemble=ensembles(), seed=st.integers(0, 1000))
def test_outlier_weights_are_a_mean_by_scores_that_only_grow(ensemble, seed):
    past_K = np.random.default_rng(seed).exponential(3.0, len(ensemble))
    past = {one.site: float(score) for one, score in zip(ensemble, past_K, strict=True)}
    moment = Moment(Aggregation(), sum(one.weight for one in ensemble), outlying=past)
    combined = aggregate("outlier-weights", ensemble, moment)
    outlying_K = np.array([combined.outlying[one.site] for one in ensemble])
    assert (outlying_K >= past_K).all() and (outlying_K <= past_K + MOST_OUTLYING).all()
    weight_K = np.array([one.weight for one in ensemble]) * np.exp(-outlying_K)
    naive = np.average(stack(ensemble), axis=0, weights=weight_K)
    np.testing.assert_allclose(combined.logits_PC, naive, rtol=1e-5, atol=1e-6)


def test_sites_that_are_alike_in_distance_are_a_mean():
    away = [(1, 0), (-1, 0), (0, 1), (0, -1), (1.5, 0), (-1.5, 0)]
    said = [Contribution(f"s{k}", 5 + np.float32([one] * 3), 2.0) for k, one in enumerate(away)]
    combined = aggregate("outlier-weights", said, Moment(Aggregation(), 12.0))
    assert set(combined.outlying.values()) == {0.0}
    np.testing.assert_allclose(combined.logits_PC, 5.0, atol=1e-6)


@given(ensemble=ensembles(fewest=5), size=st.floats(1e3, 1e4))
def test_a_loud_site_has_no_say_and_does_not_get_it_back(ensemble, size):
    honest = equally_weighted(ensemble)
    whole = 7.0 * (len(honest) + 1)
    loud = Contribution("zz", np.full_like(honest[0].logits_PC, size), 7.0)
    shaken = aggregate("outlier-weights", [*honest, loud], Moment(Aggregation(), whole))
    weight_K = np.exp([-shaken.outlying[one.site] for one in honest])
    naive = np.average(stack(honest), axis=0, weights=weight_K)
    np.testing.assert_allclose(shaken.logits_PC, naive, atol=1e-5)
    quiet = replace(loud, logits_PC=honest[0].logits_PC)
    later = aggregate(
        "outlier-weights", [*honest, quiet], Moment(Aggregation(), whole, outlying=shaken.outlying)
    )
    assert later.outlying["zz"] >= shaken.outlying["zz"] == MOST_OUTLYING


def test_a_site_whose_budget_makes_it_noisy_is_no_outlier():
    rng = np.random.default_rng(1)
    sizes = [1000.0, 1000.0, 1000.0, 100.0]  # the last one has ten times the noise
    said = [
        Contribution(f"s{k}", (rng.normal(size=(200, 3)) / size).astype(np.float32), size)
        for k, size in enumerate(sizes)
    ]
    moment = Moment(Aggregation(), sum(sizes))
    assert set(aggregate("outlier-weights", said, moment).outlying.values()) == {0.0}
    pretending = [*said[:3], replace(said[3], weight=1000.0)]
    assert aggregate("outlier-weights", pretending, moment).outlying["s3"] > 1


def test_a_site_that_outweighs_the_others_does_not_silence_them():
    said = [
        Contribution("a", np.zeros((4, 2), np.float32), 7.0),
        Contribution("b", np.ones((4, 2), np.float32), 3.0),
    ]
    np.testing.assert_allclose(combine("outlier-weights", said), np.full((4, 2), 0.3), atol=1e-6)


def test_stacking_without_a_jury_is_refused():
    with pytest.raises(ValueError, match="needs a jury"):
        combine("stacking", [Contribution("s", np.zeros((1, 2), np.float32), 1.0)])


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_ensemble_is_refused(rule):
    with pytest.raises(ValueError, match="at least one"):
        aggregate(rule, [], Moment(Aggregation(), 1.0))
