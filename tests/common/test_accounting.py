"""The arithmetic against itself by another road, against dp-accounting and against Opacus."""

import json
import math
import subprocess
import sys
import time
from collections import Counter

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from common import accounting
from common.accounting import (
    ORDERS,
    BudgetSpent,
    DiscreteLaplace,
    Event,
    GaussianSteps,
    Guarantee,
    calibrate,
    delta_of,
    epsilon,
    fits_lifetime,
    from_json,
    how_many_more,
    lifetime_epsilon,
    second_opinion,
    tally,
    to_dp_event,
    to_json,
    untally,
)
from common.errors import ConfigError, UserError

sigmas = st.floats(0.3, 200)
full_steps = st.builds(GaussianSteps, sigmas, st.just(1.0), st.integers(1, 500))
sampled_steps = st.builds(GaussianSteps, sigmas, st.floats(1e-4, 0.9), st.integers(1, 500))
counts = st.builds(DiscreteLaplace, st.floats(0.001, 3))
events = st.one_of(full_steps, sampled_steps, counts)
deltas = st.floats(-12, -1.5).map(lambda exponent: 10**exponent)


# ---- Events ----


@given(events)
def test_events_survive_the_trip_through_json(event: Event) -> None:
    assert from_json(to_json(event)) == event
    assert from_json(to_json(event)).__class__ is event.__class__


def test_json_is_canonical_whatever_numbers_it_was_made_from() -> None:
    made = GaussianSteps(np.float64(2), 1, np.int64(20))
    assert to_json(made) == '{"event":"gaussian-steps","noise_multiplier":2.0,"sample_rate":1.0,"steps":20}'
    assert to_json(DiscreteLaplace(1)) == '{"epsilon":1.0,"event":"discrete-laplace"}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"event":"laplace","epsilon":1.0}',
        '{"epsilon":1.0}',
        '{"event":["discrete-laplace"],"epsilon":1.0}',
        '{"epsilon":1.0,"event":"discrete-laplace","more":1}',
        '{"epsilon":1,"event":"discrete-laplace"}',
        '{"epsilon": 1.0,"event":"discrete-laplace"}',
        '{"epsilon":9.0,"epsilon":1.0,"event":"discrete-laplace"}',
        '{"epsilon":NaN,"event":"discrete-laplace"}',
        '{"epsilon":1' + "0" * 400 + ',"event":"discrete-laplace"}',
        '{"event":"gaussian-steps","noise_multiplier":2.0,"sample_rate":1.0,"steps":true}',
    ],
)
def test_what_is_not_understood_is_not_priced(text: str) -> None:
    with pytest.raises(UserError, match="privacy event"):
        from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("noise_multiplier", bad) for bad in (0, -1.0, math.nan, math.inf, 1e-9, "1", None, True, 1j)),
        *(("sample_rate", bad) for bad in (0, -0.1, 1.0001, 2, math.nan, "1", True)),
        *(("steps", bad) for bad in (0, -1, 1.0, 2.5, math.nan, 10**12, "3", True)),
    ],
)
def test_steps_that_cannot_be_accounted_cannot_be_made(field: str, value: object) -> None:
    good: dict[str, object] = {"noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 3}
    with pytest.raises(ConfigError, match=field):
        GaussianSteps(**(good | {field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", True, 1e3])
def test_counts_that_cannot_be_accounted_cannot_be_made(value: object) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        DiscreteLaplace(value)  # type: ignore[arg-type]


@given(st.lists(events, max_size=6))
def test_a_tally_forgets_only_the_order_and_the_grouping(some: list[Event]) -> None:
    assert tally(untally(tally(some))) == tally(some) == tally(reversed(some))
    assert list(tally(some)) == list(tally(reversed(some)))


# ---- One run ----


def test_twenty_steps_are_one_gaussian_with_less_noise() -> None:
    together, accountant = epsilon([GaussianSteps(20.0, 1.0, 20)], 1e-5)
    assert accountant == "gaussian-exact"
    assert together == pytest.approx(epsilon([GaussianSteps(20 / math.sqrt(20), 1.0, 1)], 1e-5)[0], rel=1e-12)
    assert together == pytest.approx(epsilon([GaussianSteps(20.0, 1.0, 1)] * 20, 1e-5)[0], rel=1e-12)


@given(st.floats(1e-3, 40), st.floats(0, 60))
def test_the_closed_form_is_the_hockey_stick_divergence(mu: float, at: float) -> None:
    # Two normals whose log ratio is μ·x − μ²/2: the definition, integrated numerically.
    ours = accounting._gaussian_delta(at, mu)
    start = at / mu + mu / 2
    x = np.linspace(start, max(start, mu) + 12, 100_001)
    integrand = stats.norm.pdf(x - mu) * -np.expm1(at - mu * x + mu * mu / 2)
    reference = float(np.trapezoid(integrand, x))
    assert ours == pytest.approx(reference, rel=1e-5, abs=1e-30)


@given(st.floats(-400, 400))
def test_the_logarithm_of_the_normal_distribution_is_accurate(x: float) -> None:
    assert accounting._log_normal_cdf(x) == pytest.approx(special.log_ndtr(x), rel=1e-11)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_closed_form_and_dp_accounting_agree_at_full_batch(sigma: float, delta: float) -> None:
    run = [GaussianSteps(sigma, 1.0, 12)]
    reference = PLDAccountant().compose(to_dp_event(run[0])).get_epsilon(delta)
    assert epsilon(run, delta)[0] == pytest.approx(reference, rel=1e-4)
    assert epsilon(run, delta)[0] <= reference + 1e-9


@pytest.mark.parametrize(
    "run",
    [
        [GaussianSteps(6.0, 1.0, 20), DiscreteLaplace(0.2)],
        [GaussianSteps(6.0, 1.0, 20), DiscreteLaplace(0.2), DiscreteLaplace(0.2), DiscreteLaplace(0.07)],
        [DiscreteLaplace(0.5)],
        [DiscreteLaplace(0.5), DiscreteLaplace(1.5)],
        [GaussianSteps(1.5, 0.1, 60), DiscreteLaplace(0.3), GaussianSteps(9.0, 1.0, 5)],
    ],
    ids=["histogram", "several counts", "count alone", "counts alone", "sampled"],
)
def test_steps_and_counts_compose_as_dp_accounting_has_it(run: list[Event]) -> None:
    accountant = PLDAccountant()
    for event in run:
        accountant.compose(to_dp_event(event))
    ours, name = epsilon(run, 1e-5)
    assert name == "pld"
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-4)
    assert delta_of(run, ours) == pytest.approx(1e-5, rel=1e-2)


def test_many_different_counts_are_accounted_numerically() -> None:
    run = [DiscreteLaplace(0.01 + 0.001 * i) for i in range(13)]
    reference = PLDAccountant().compose(dp_accounting.ComposedDpEvent([to_dp_event(e) for e in run]))
    assert epsilon(run, 1e-5) == (pytest.approx(reference.get_epsilon(1e-5), rel=1e-6), "pld")


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        [GaussianSteps(1.5, 0.1, 200)],
        [GaussianSteps(1.0, 0.01, 2000)],
        [GaussianSteps(5.0, 1.0, 20), GaussianSteps(1.5, 0.1, 20)],
        [GaussianSteps(1.5, 0.1, 100), DiscreteLaplace(0.2), DiscreteLaplace(0.2)],
    ],
    ids=["sampled", "long", "both", "with counts"],
)
def test_opacus_prv_agrees_under_sampling(run: list[Event]) -> None:
    ours, name = epsilon(run, 1e-5)
    other, other_name = second_opinion(run, 1e-5)
    assert (name, other_name) == ("pld", "prv")
    assert (
        ours - 1e-3 <= other <= ours + 0.012
    )  # PRV is an upper bound, by construction 0.01 above its estimate


@pytest.mark.slow
def test_opacus_prv_agrees_at_full_batch() -> None:
    from opacus.accountants import PRVAccountant

    run = [GaussianSteps(5.0, 1.0, 20)]
    prv = PRVAccountant()
    prv.history = [(5.0, 0.999999999, 20)]
    assert epsilon(run, 1e-5)[0] <= prv.get_epsilon(1e-5) <= epsilon(run, 1e-5)[0] + 0.011


@given(full_steps, st.lists(counts, max_size=2), deltas)
def test_second_opinion_on_full_batches_is_another_road_to_the_same_place(
    steps: GaussianSteps, bought: list[Event], delta: float
) -> None:
    first = epsilon([steps, *bought], delta)[0]
    if first < 40:
        assert second_opinion([steps, *bought], delta)[0] == pytest.approx(first, rel=1e-3, abs=1e-5)


def test_counts_whose_losses_add_up_to_the_same_sum_all_count():
    # 1.0 + 0.1 − 1.1 = 0 in two ways; a sum over distinct sums would lose one of them, and report too little.
    steps, bought = GaussianSteps(1.0, 1.0, 5), [DiscreteLaplace(a) for a in (1.0, 1.1, 0.1)]
    exact, by_distributions = epsilon([steps, *bought], 0.01)[0], second_opinion([steps, *bought], 0.01)[0]
    assert exact == pytest.approx(by_distributions, rel=1e-4)


@given(full_steps, st.lists(counts, max_size=3), deltas)
def test_less_noise_more_steps_or_less_delta_never_cost_less(
    steps: GaussianSteps, bought: list[Event], delta: float
) -> None:
    cost = epsilon([steps, *bought], delta)[0]
    sigma, count = steps.noise_multiplier, steps.steps
    assert cost <= epsilon([GaussianSteps(sigma * 0.99, 1.0, count), *bought], delta)[0]
    assert cost <= epsilon([GaussianSteps(sigma, 1.0, count + 1), *bought], delta)[0]
    assert cost <= epsilon([steps, *bought, DiscreteLaplace(0.1)], delta)[0] * (1 + 1e-12)
    assert cost <= epsilon([steps, *bought], delta / 2)[0]
    assert delta_of([steps, *bought], cost) <= delta


def test_sampling_fewer_never_costs_more() -> None:
    costs = [epsilon([GaussianSteps(2.0, rate, 50)], 1e-5)[0] for rate in (0.01, 0.1, 0.5, 0.9, 1.0)]
    assert costs == sorted(costs)


def test_nothing_done_costs_nothing() -> None:
    assert epsilon([], 1e-5)[0] == lifetime_epsilon([], 1e-5)[0] == second_opinion([], 1e-5)[0] == 0
    assert delta_of([], 0.0) == 0
    assert epsilon([GaussianSteps(1e6, 1.0, 1)], 1e-5)[0] == 0


@pytest.mark.parametrize(
    "absurd",
    [
        GaussianSteps(0.001, 0.5, 10_000),
        GaussianSteps(0.3, 0.9, 100_000),
        GaussianSteps(50.0, 0.1, 100_000_000),
    ],
)
def test_absurd_sampled_plans_are_priced_at_once_as_no_privacy(absurd: Event) -> None:
    started = time.monotonic()
    assert epsilon([absurd], 1e-5)[0] == second_opinion([absurd], 1e-5)[0] == math.inf
    assert delta_of([absurd], 1.0) == 1.0
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("delta", [0, 1, -1e-5, math.nan, 2])
def test_a_delta_without_meaning_is_refused(delta: float) -> None:
    run = [GaussianSteps(5.0, 1.0, 20)]
    for ask in (
        lambda: epsilon(run, delta),
        lambda: lifetime_epsilon(run, delta),
        lambda: second_opinion(run, delta),
        lambda: calibrate(1.0, delta, steps=1, sample_rate=1.0),
        lambda: fits_lifetime([], run, 1.0, delta),
    ):
        with pytest.raises(ConfigError, match="delta"):
            ask()


# ---- Calibration ----


@settings(deadline=None)
@given(st.floats(0.01, 50), deltas, st.integers(1, 3000))
def test_calibration_comes_close_and_never_exceeds(target: float, delta: float, steps: int) -> None:
    sigma = calibrate(target, delta, steps=steps, sample_rate=1.0)
    spent = epsilon([GaussianSteps(sigma, 1.0, steps)], delta)[0]
    assert spent <= target
    assert spent > 0.99 * target or epsilon([GaussianSteps(sigma * 0.998, 1.0, steps)], delta)[0] > target
    assert float(f"{sigma:.4g}") == sigma


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 5), full_steps, st.lists(counts, max_size=2), st.integers(1, 100))
def test_calibration_counts_what_was_spent(
    target: float, before: GaussianSteps, bought: list[Event], steps: int
) -> None:
    spent = [before, *bought]
    if epsilon(spent, 1e-5)[0] > 0.999 * target:
        return
    sigma = calibrate(target, 1e-5, steps=steps, sample_rate=1.0, spent=spent)
    assert epsilon([*spent, GaussianSteps(sigma, 1.0, steps)], 1e-5)[0] <= target
    assert epsilon([*spent, GaussianSteps(sigma * 0.99, 1.0, steps)], 1e-5)[0] > 0.9 * target


@pytest.mark.parametrize(("target", "rate", "steps"), [(1.0, 0.1, 200), (0.1, 0.05, 100), (3.0, 0.25, 30)])
def test_calibration_under_sampling(target: float, rate: float, steps: int) -> None:
    started = time.monotonic()
    sigma = calibrate(target, 1e-5, steps=steps, sample_rate=rate, spent=[DiscreteLaplace(0.05 * target)])
    assert time.monotonic() - started < 10
    spent = epsilon([GaussianSteps(sigma, rate, steps), DiscreteLaplace(0.05 * target)], 1e-5)[0]
    assert 0.998 * target < spent <= target


def test_calibration_at_full_batch_takes_milliseconds() -> None:
    calibrate(1.0, 1e-5, steps=7, sample_rate=1.0)
    started = time.process_time()
    for steps in range(1, 21):
        calibrate(1.0, 1e-5, steps=steps, sample_rate=1.0)
    assert (time.process_time() - started) / 20 < 0.005


def test_a_spent_budget_buys_no_noise() -> None:
    with pytest.raises(BudgetSpent, match="nothing is left"):
        calibrate(1.0, 1e-5, steps=1, sample_rate=1.0, spent=[GaussianSteps(1.0, 1.0, 10)])
    with pytest.raises(BudgetSpent):
        calibrate(0.5, 1e-5, steps=1, sample_rate=0.1, spent=[DiscreteLaplace(0.6)])


@pytest.mark.parametrize("target", [0, -1, math.nan, math.inf])
def test_a_target_without_meaning_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        calibrate(target, 1e-5, steps=1, sample_rate=1.0)


# ---- All runs ----


@settings(deadline=None)
@given(events)
def test_renyi_orders_agree_with_dp_accounting(event: Event) -> None:
    if isinstance(event, DiscreteLaplace):
        # Naively: sum over the two distributions' common support.
        reach = math.ceil(40 / event.epsilon)
        x = np.arange(-reach, reach + 1)
        log_p = np.log(np.tanh(event.epsilon / 2)) - event.epsilon * np.abs(x)
        log_q = np.log(np.tanh(event.epsilon / 2)) - event.epsilon * np.abs(x - 1)
        for alpha, ours in zip(ORDERS[:4], accounting._renyi(tally([event])), strict=False):
            log_sum = special.logsumexp(alpha * log_p + (1 - alpha) * log_q)
            assert ours == pytest.approx(log_sum / (alpha - 1), rel=1e-6, abs=1e-9)
        return
    accountant = RdpAccountant(orders=list(ORDERS)).compose(to_dp_event(event))
    for ours, theirs in zip(accounting._renyi(tally([event])), accountant._rdp, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@given(st.floats(0.01, 6))
def test_a_count_trades_errors_no_worse_than_its_gaussian(a: float) -> None:
    mu = accounting._count_mu(a)
    for at in np.linspace(0, a, 9):
        pure = delta_of([DiscreteLaplace(a)], float(at))
        assert pure <= accounting._gaussian_delta(float(at), mu) + 1e-12


@settings(deadline=None)
@given(st.lists(st.one_of(full_steps, counts), max_size=5), deltas)
def test_a_lifetime_costs_no_less_than_fixed_parameters_would(some: list[Event], delta: float) -> None:
    lifetime, _ = lifetime_epsilon(some, delta)
    assert lifetime >= epsilon(some, delta)[0] * (1 - 1e-9)
    assert lifetime_epsilon([*some, DiscreteLaplace(0.1)], delta)[0] >= lifetime


def test_the_gaussian_filter_costs_hardly_more_than_fixed_parameters() -> None:
    runs = [GaussianSteps(20.0, 1.0, 20)] * 5
    exact = epsilon(runs, 1e-5)[0]
    assert lifetime_epsilon(runs, 1e-5) == (pytest.approx(exact, rel=0.01), "gaussian-filter")
    sampled = [GaussianSteps(1.5, 0.1, 100)]
    assert lifetime_epsilon(sampled, 1e-5)[1] == "renyi-filter"
    assert epsilon(sampled, 1e-5)[0] < lifetime_epsilon(sampled, 1e-5)[0] < 1.5 * epsilon(sampled, 1e-5)[0]


@settings(deadline=None)
@given(st.lists(events, min_size=1, max_size=3), st.lists(events, min_size=1, max_size=2))
def test_the_lifetime_is_the_least_cap_that_lets_a_plan_pass(
    spent: list[Event], planned: list[Event]
) -> None:
    after = lifetime_epsilon([*spent, *planned], 1e-5)[0]
    assert fits_lifetime(spent, planned, after * (1 + 1e-9) + 1e-12, 1e-5)
    if after > 1e-6:
        assert not fits_lifetime(spent, planned, after * (1 - 1e-6), 1e-5)


@settings(deadline=None)
@given(st.lists(full_steps, max_size=2), full_steps, st.floats(0.5, 20))
def test_how_many_more_is_the_last_that_fits(spent: list[Event], plan: Event, cap: float) -> None:
    many = how_many_more(spent, [plan], cap, 1e-5, most=10_000)
    if many:
        assert fits_lifetime([*spent, *[plan] * (many - 1)], [plan], cap, 1e-5)
    if many < 10_000:
        assert not fits_lifetime([*spent, *[plan] * many], [plan], cap, 1e-5)


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_a_lifetime_may_be_one_run_that_takes_it_whole(rate: float) -> None:
    sigma = calibrate(1.0, 1e-5, steps=20, sample_rate=rate)
    plan = [GaussianSteps(sigma, rate, 20)]
    assert fits_lifetime([], plan, 1.0, 1e-5)
    assert how_many_more([], plan, 1.0, 1e-5) == 1
    assert not fits_lifetime(plan, [GaussianSteps(1e5, 1.0, 1)], 1.0, 1e-5)
    assert how_many_more(plan, plan, 1.0, 1e-5) == 0


def test_a_plan_that_does_nothing_always_fits() -> None:
    assert fits_lifetime([GaussianSteps(5.0, 1.0, 20)], [], 5.0, 1e-5)
    assert how_many_more([], [], 1.0, 1e-5, most=7) == 7


def test_a_filter_stops_an_adaptive_spender_where_the_cap_is() -> None:
    rng = np.random.default_rng(0)
    spent: list[Event] = []
    for _ in range(400):
        plan = GaussianSteps(
            float(rng.uniform(3, 60)), float(rng.choice([1.0, 0.1])), int(rng.integers(1, 30))
        )
        if fits_lifetime(spent, [plan], 4.0, 1e-5):
            spent = list(untally(tally([*spent, plan])))
    assert 3.5 < lifetime_epsilon(spent, 1e-5)[0] <= 4.0


# ---- The claim, and the weight ----


def test_a_guarantee_is_printed_whole() -> None:
    claim = Guarantee(0.98765, 1e-5, "patient", "add-remove", "gaussian-exact", "run")
    assert str(claim) == "ε = 0.9877, δ = 1e-05 (one patient added or removed; gaussian-exact; this run)"


@given(value=st.floats(0, allow_nan=False, allow_infinity=False))
def test_a_guarantee_is_never_printed_below_the_truth(value: float) -> None:
    claim = Guarantee(value, 1e-5, "record", "add-remove", "gaussian-exact", "lifetime")
    assert float(str(claim).removeprefix("ε = ").partition(", δ")[0].replace(",", "")) >= value


def test_full_batch_accounting_needs_no_heavy_library() -> None:
    code = """
import json, sys
from common.accounting import *
run = [GaussianSteps(20.0, 1.0, 20), DiscreteLaplace(0.05)]
calibrate(1.0, 1e-5, steps=20, sample_rate=1.0, spent=run[1:])
epsilon(run, 1e-5), lifetime_epsilon([GaussianSteps(2.0, 0.1, 20)], 1e-5), fits_lifetime(run, run, 1.0, 1e-5)
print(json.dumps(sorted({"numpy", "scipy", "torch", "opacus", "dp_accounting"} & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_tallies_of_thousands_of_runs_stay_small() -> None:
    assert len(tally([GaussianSteps(20.0, 1.0, 20)] * 5000)) == 1
    assert untally(Counter({GaussianSteps(20.0, 1.0, 1): 7})) == (GaussianSteps(20.0, 1.0, 7),)
