"""Privacy arithmetic: what was done to the private records, and what it costs.

The durable record is a list of *events*, never an ε: history can then be accounted again, by a better
accountant or by a second one. So the meaning of an event may never change; what is new gets a new class.
Events are checked where they are made, so whoever holds one holds something that can be accounted. The
neighbouring relation is add-or-remove-one-unit throughout, the unit being a record or a patient.

Three questions are answered here, each by the sharpest arithmetic that answers it honestly:

- *What does this run cost?* (`epsilon`, `delta_of`, `calibrate`.) A run's σ, sample rate and steps are fixed
  before a record is read, so composition is not adaptive in its parameters. T full-batch Gaussian steps are
  exactly one Gaussian mechanism with μ² = Σ 1/σ², whose privacy profile has a closed form; the loss of a
  discrete Laplace count takes two values only, so the two together have a closed form as well.
  Poisson-sampled steps need numerical privacy loss distributions (dp-accounting, imported only then: it
  weighs 75 MiB).
- *What do all runs cost together?* (`lifetime_epsilon`, `fits_lifetime`, `how_many_more`.) Later runs are
  chosen with earlier releases in view, and for that a privacy *filter* is needed; see `lifetime_epsilon`.
- *Is that right?* (`second_opinion`.) Another implementation of another method, for `verify` and the tests.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from numbers import Integral, Real
from statistics import NormalDist
from typing import Any, Final, Literal

from common.errors import ConfigError, UserError
from common.rounding import at_most, rounded_up

Accountant = Literal["gaussian-exact", "pld", "gaussian-filter", "renyi-filter", "prv"]
Unit = Literal["record", "patient"]

# ---- Events ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianSteps:
    """`steps` noisy sums over the private units, the same number of times each.

    A step takes every unit independently with probability `sample_rate` (1: all of them), sums one vector of
    bounded Euclidean norm for each and adds Gaussian noise whose standard deviation is `noise_multiplier`
    times that bound. Steps may depend on the outcome of earlier ones.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be accounted."""
        _hold(
            self,
            "noise_multiplier",
            _real(self, "noise_multiplier", 1e-3, 1e6, "a number from 0.001 to 1,000,000"),
        )
        _hold(self, "sample_rate", _real(self, "sample_rate", 1e-9, 1.0, "a rate above 0 and at most 1"))
        steps = self.steps
        if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= MOST_STEPS:
            raise ConfigError("privacy event", "steps", steps, f"a whole number from 1 to {MOST_STEPS:,}")
        _hold(self, "steps", int(steps))


@dataclass(frozen=True)
class DiscreteLaplace:
    """A vector of counts to which a unit adds at most 1 in all (L1), released with discrete Laplace noise.

    The noise on every count is drawn with P(x) = tanh(ε/2)·exp(−ε·|x|), so the release by itself is
    ε-differentially private.
    """

    epsilon: float

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be accounted."""
        _hold(self, "epsilon", _real(self, "epsilon", 1e-9, 100.0, "a number above 0 and at most 100"))


Event = GaussianSteps | DiscreteLaplace

LEAST_SIGMA: Final = 1e-3
MOST_SIGMA: Final = 1e6
MOST_STEPS: Final = 1_000_000_000
MOST_SUMS: Final = 4096

_EVENTS: Mapping[str, type[Event]] = {"gaussian-steps": GaussianSteps, "discrete-laplace": DiscreteLaplace}
_NAMES = {kind: name for name, kind in _EVENTS.items()}


def _hold(event: Event, field: str, value: float) -> None:
    object.__setattr__(event, field, value)  # the one write to a frozen event, while it is made


def _real(event: Event, field: str, least: float, most: float, expected: str) -> float:
    value = getattr(event, field)
    # The comparison also refuses NaN.
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) <= most:
        raise ConfigError("privacy event", field, value, expected)
    return float(value)


def to_json(event: Event) -> str:
    """Write an event down in its one canonical form."""
    return json.dumps({"event": _NAMES[type(event)], **asdict(event)}, sort_keys=True, separators=(",", ":"))


def from_json(text: str) -> Event:
    """Read an event.

    Raises:
        UserError: if the event is unknown to this version, its numbers cannot be accounted, or the text is
            not canonical. Nothing is guessed: an event that isn't understood can't be priced.
    """
    try:
        fields = dict(json.loads(text))
        event = _EVENTS[fields.pop("event")](**fields)
        canonical = to_json(event)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(f"privacy event: {text[:200]!r} is not an event that this version knows") from None
    if canonical != text:
        raise UserError(f"privacy event: {text[:200]!r} is not in canonical form")
    return event


def to_dp_event(event: Event) -> Any:
    """Say the same in dp-accounting's vocabulary (a `dp_accounting.DpEvent`), for accountants elsewhere."""
    from dp_accounting import dp_event

    if isinstance(event, DiscreteLaplace):
        return dp_event.DiscreteLaplaceDpEvent(noise_parameter=event.epsilon, sensitivity=1)
    step = dp_event.GaussianDpEvent(event.noise_multiplier)
    if event.sample_rate < 1:
        step = dp_event.PoissonSampledDpEvent(event.sample_rate, step)
    return dp_event.SelfComposedDpEvent(step, event.steps)


Tally = Counter[Event]
"""How often each single step and each count happens: the form in which events are added and compared."""


def tally(events: Iterable[Event]) -> Tally:
    """Count single steps and counts, in an order that depends on nothing but what they are."""
    counts: Tally = Counter()
    for event in events:
        if isinstance(event, GaussianSteps):
            counts[GaussianSteps(event.noise_multiplier, event.sample_rate, 1)] += event.steps
        else:
            counts[event] += 1
    return Counter(dict(sorted(counts.items(), key=lambda item: to_json(item[0]))))


def untally(counts: Tally) -> tuple[Event, ...]:
    """Turn a tally into events again."""
    events: list[Event] = []
    for event, count in counts.items():
        if isinstance(event, GaussianSteps):
            events += [GaussianSteps(event.noise_multiplier, event.sample_rate, count)] * (count > 0)
        else:
            events += [event] * count
    return tuple(events)


# ---- The claim ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guarantee:
    """An ε with everything it means nothing without."""

    epsilon: float
    delta: float
    unit: Unit
    adjacency: Literal["add-remove"]
    accountant: Accountant
    horizon: Literal["run", "lifetime"]

    def __str__(self) -> str:
        """One line, for tables and logs."""
        horizon = {"run": "this run", "lifetime": "lifetime"}[self.horizon]
        means = f"one {self.unit} added or removed; {self.accountant}; {horizon}"
        return f"ε = {at_most(self.epsilon)}, δ = {self.delta!r} ({means})"


class BudgetSpent(UserError):
    """No noise, however strong, fits into what is left."""


# ---- One run -----------------------------------------------------------------------------------------------


def epsilon(events: Sequence[Event], delta: float) -> tuple[float, Accountant]:
    """Return ε of these events together, parameters fixed beforehand, and the accountant that says so.

    `gaussian-exact` is the closed form for full-batch Gaussian steps; `pld` is composition of privacy loss
    distributions, analytic for full-batch steps with discrete Laplace counts, numerical (and never below the
    truth by more than rounding) for Poisson-sampled steps.
    """
    _check_delta(delta)
    counts = tally(events)
    if not _closed_form(counts):
        return _pld_epsilon(tuple(counts.items()), delta), "pld"
    counted = any(isinstance(event, DiscreteLaplace) for event in counts)
    return _exact_epsilon(counts, delta), "pld" if counted else "gaussian-exact"


def delta_of(events: Sequence[Event], epsilon: float) -> float:
    """Return the smallest δ at which these events together are (ε, δ)-differentially private."""
    counts = tally(events)
    if _closed_form(counts):
        return _exact_delta(counts)(epsilon)
    whole = _pld(counts)
    return 1.0 if whole is None else float(whole.get_delta_for_epsilon(epsilon))


def calibrate(
    target_epsilon: float, delta: float, *, steps: int, sample_rate: float, spent: Sequence[Event] = ()
) -> float:
    """Return the least σ with which `steps` further steps keep the whole, `spent` included, within (ε, δ).

    σ is rounded up to four significant digits, so the target is approached from below and never exceeded.

    Raises:
        ConfigError: for a target, δ, rate or number of steps that makes no sense.
        BudgetSpent: if `spent` leaves nothing.
    """
    if not 0 < target_epsilon < math.inf:
        raise ConfigError("privacy", "epsilon", target_epsilon, "a finite number above 0")
    _check_delta(delta)

    def price(sigma: float) -> float:
        return epsilon((*spent, GaussianSteps(sigma, sample_rate, steps)), delta)[0]

    def rough_price(sigma: float) -> float:
        return _renyi_epsilon(_renyi(tally([GaussianSteps(sigma, sample_rate, steps)])), max(delta, 1e-12))

    # One price may take a second and more at low rates, so the search begins where the Rényi bound, which
    # costs next to nothing but can't go very low, ends it.
    rough = _least_sigma(rough_price, max(target_epsilon, 0.5), guess=math.sqrt(steps), tolerance=1e-2)
    sigma = rounded_up(_least_sigma(price, target_epsilon, guess=rough, tolerance=1e-4))
    while price(sigma) > target_epsilon:  # numerical prices fall with σ only up to rounding
        sigma = rounded_up(sigma * (1 + 1e-6))
    return sigma


def _least_sigma(price: Callable[[float], float], target: float, *, guess: float, tolerance: float) -> float:
    """Find the least σ with price(σ) ≤ target, within a relative tolerance on the safe side.

    The price falls with σ, is nearly straight over log σ and may be slow: false position, Illinois variant.
    """
    low = high = min(max(guess, LEAST_SIGMA), MOST_SIGMA)
    over = under = price(high) - target
    factor = 1.1
    while under > 0:
        if high == MOST_SIGMA:
            raise BudgetSpent(f"nothing is left of ε = {target:g} that further noisy steps would fit into")
        low, over = high, under
        high, factor = min(high * factor, MOST_SIGMA), factor * factor
        under = price(high) - target
    while over <= 0:
        if low == LEAST_SIGMA:
            return low
        high, under = low, over
        low, factor = max(low / factor, LEAST_SIGMA), factor * factor
        over = price(low) - target
    moved = ""
    while high / low > 1 + tolerance:
        share = min(max(over / (over - under), 0.02), 0.98)
        middle = low * (high / low) ** share
        excess = price(middle) - target
        if excess > 0:
            low, over, under, moved = middle, excess, under / 2 if moved == "low" else under, "low"
        else:
            high, under, over, moved = middle, excess, over / 2 if moved == "high" else over, "high"
    return high


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError("privacy", "delta", delta, "a number above 0 and below 1")


# ---- Closed forms ------------------------------------------------------------------------------------------


def _sampled(event: Event) -> bool:
    return isinstance(event, GaussianSteps) and event.sample_rate < 1


def _closed_form(counts: Tally) -> bool:
    """Whether every step takes all units, and the counts are few enough to list the sums of their losses."""
    return _count_sums(counts) <= MOST_SUMS and not any(map(_sampled, counts))


def _count_sums(counts: Tally) -> int:
    return math.prod(count + 1 for event, count in counts.items() if isinstance(event, DiscreteLaplace))


def _exact_epsilon(counts: Tally, delta: float) -> float:
    mu2 = _gaussian_load(counts, of_counts=lambda _: 0.0)
    return _least_epsilon(_exact_delta(counts), delta, _loss_bound(mu2, delta) + _count_total(counts))


def _loss_bound(mu2: float, delta: float) -> float:
    """What a Gaussian mechanism's privacy loss passes with a probability below δ."""
    return mu2 / 2 + math.sqrt(-2 * mu2 * math.log(delta))


def _least_epsilon(profile: Callable[[float], float], delta: float, most: float) -> float:
    """Invert a privacy profile ε ↦ δ by bisection up to `most`, on the safe side."""
    if profile(0.0) <= delta:
        return 0.0
    low, high = 0.0, most
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if profile(middle) <= delta else (middle, high)
    return high


def _exact_delta(counts: Tally) -> Callable[[float], float]:
    """Return the privacy profile ε ↦ δ of full-batch Gaussian steps and discrete Laplace counts together.

    With P and Q the distributions on neighbours, δ(ε) = E_P[max(0, 1 − e^(ε−L))], L = ln(dP/dQ) adding up
    over mechanisms. So a count, whose L is ±a, shifts the Gaussian's profile: δ(ε) = Σ P(l)·δ_Gauss(ε − l)
    over the sums l of the counts' losses.
    """
    mu = math.sqrt(_gaussian_load(counts, of_counts=lambda _: 0.0))
    losses = _count_losses(counts)
    return lambda epsilon: math.fsum(chance * _gaussian_delta(epsilon - loss, mu) for loss, chance in losses)


def _gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ), ε < 0 included (Balle & Wang 2018, theorem 8, 1805.06530)."""
    if mu == 0:
        return max(0.0, -math.expm1(epsilon))
    log_first = _log_normal_cdf(mu / 2 - epsilon / mu)
    log_second = epsilon + _log_normal_cdf(-mu / 2 - epsilon / mu)
    return math.exp(log_first) * -math.expm1(min(0.0, log_second - log_first))


def _log_normal_cdf(x: float) -> float:
    """Return ln Φ(x) without under- or overflow."""
    if x > 5:
        return math.log1p(-math.erfc(x / math.sqrt(2)) / 2)
    if x > -30:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    # Abramowitz & Stegun 26.2.12; at x = −30 the first term left out is 1e-15.
    z = 1 / (x * x)
    series = -z * (1 - 3 * z * (1 - 5 * z * (1 - 7 * z * (1 - 9 * z))))
    return -x * x / 2 - math.log(-x) - math.log(2 * math.pi) / 2 + math.log1p(series)


def _count_total(counts: Tally) -> float:
    """The most that the counts' losses can add up to."""
    return sum(event.epsilon * count for event, count in counts.items() if isinstance(event, DiscreteLaplace))


def _count_losses(counts: Tally) -> list[tuple[float, float]]:
    """List the possible sums of the counts' privacy losses, each with its probability.

    A unit moves one count by one, so ln P(x)/P(x−1) is a for x ≤ 0 and −a beyond: P(L = a) = e^a/(1 + e^a),
    as for randomised response.
    """
    sums = [(0.0, 1.0)]  # a list: different ways may have the same sum, and each has a probability of its own
    for event, count in counts.items():
        if isinstance(event, DiscreteLaplace):
            a = event.epsilon
            log_up, log_down = -math.log1p(math.exp(-a)), -a - math.log1p(math.exp(-a))
            binomial: list[tuple[float, float]] = []
            for ups in range(count + 1):
                log_ways = math.lgamma(count + 1) - math.lgamma(ups + 1) - math.lgamma(count - ups + 1)
                chance = math.exp(log_ways + ups * log_up + (count - ups) * log_down)
                binomial.append((a * (2 * ups - count), chance))
            sums = [(loss + more, p * q) for loss, p in sums for more, q in binomial]
    return sums


# ---- Numerical distributions -------------------------------------------------------------------------------


MOST_EPSILON: Final = 1000.0
MOST_SAMPLED_STEPS: Final = 1_000_000
"""Beyond this Rényi bound on ε, or this many sampled steps of a kind, numerical accounting says ε = ∞ instead
of filling memory and hours with digits: whoever asks for a price may be hostile."""


def _out_of_reach(counts: Tally) -> bool:
    many = any(count > MOST_SAMPLED_STEPS for event, count in counts.items() if _sampled(event))
    return many or _rough_epsilon(counts) > MOST_EPSILON


def _rough_epsilon(counts: Tally) -> float:
    return _renyi_epsilon(_renyi(counts), 1e-6)


@lru_cache(maxsize=256)
def _pld_epsilon(items: tuple[tuple[Event, int], ...], delta: float) -> float:
    whole = _pld(Counter(dict(items)))
    return math.inf if whole is None else float(whole.get_epsilon_for_delta(delta))


def _pld(counts: Tally) -> Any:
    """Compose dp-accounting's privacy loss distributions, discretised pessimistically (connect the dots).

    Returns:
        A `PrivacyLossDistribution`, or None beyond `MOST_EPSILON` or `MOST_SAMPLED_STEPS`.
    """
    if _out_of_reach(counts):
        return None
    mesh = 1e-4 * max(1.0, _rough_epsilon(counts) / 40)
    return reduce(
        lambda whole, part: whole.compose(part),
        (_pld_of(event, count, mesh) for event, count in counts.items()),
    )


@lru_cache(maxsize=16)
def _pld_of(event: Event, count: int, mesh: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    if isinstance(event, DiscreteLaplace):
        return pld.from_discrete_laplace_mechanism(
            event.epsilon, sensitivity=1, value_discretization_interval=mesh
        ).self_compose(count)
    if event.sample_rate == 1:
        return pld.from_gaussian_mechanism(
            event.noise_multiplier / math.sqrt(count), value_discretization_interval=mesh
        )
    return pld.from_gaussian_mechanism(
        event.noise_multiplier, sampling_prob=event.sample_rate, value_discretization_interval=mesh
    ).self_compose(count)


# ---- All runs ----------------------------------------------------------------------------------------------

ORDERS: Final = (2, 3, 5, 9, 17, 33, 65, 129)
"""Rényi orders of the lifetime filter: whole, so that the sampled Gaussian has a closed form; α − 1 doubles,
which costs ε at most 6 % where an order in between would be best."""

GAUSSIAN_SHARE: Final = 0.9
"""Share of the lifetime's δ that the Gaussian filter has; the rest is dealt evenly over the Rényi orders."""


def lifetime_epsilon(events: Sequence[Event], delta: float) -> tuple[float, Accountant]:
    """Return the least lifetime cap on ε, at δ, that a filter would have let these events pass under.

    Runs are chosen with earlier releases in view: their σ, rates and lengths are themselves outcomes, and
    composition theorems for fixed parameters no longer hold. A *filter* may be used then: it stops what would
    take an adding quantity over a limit fixed in advance.

    - Gaussian filter: Σ μ² ≤ B² makes the whole B-Gaussian-DP, as if the parameters had been fixed (Smith &
      Thakurta 2022, arXiv:2210.17520). A full-batch step has μ = 1/σ; a count that is a-DP has μ =
      −2·Φ⁻¹(1/(1 + e^a)), the trade-off curve that meets randomised response's corner. A sampled step has no
      useful μ.
    - Rényi filter of order α: Σ ε_α ≤ B (Feldman & Zrnic 2021, arXiv:2008.11193), for every event, turned
      into (ε, δ) by proposition 12 of Canonne, Kamath & Steinke 2020 (arXiv:2004.00010).

    What passes is what at least one filter lets pass. Which one that is may depend on releases too, so each
    has a share of δ of its own, fixed in advance (`GAUSSIAN_SHARE`): histories that end under filter i
    contribute at most δ_i to E_P[max(0, 1 − e^(ε−L))].
    """
    _check_delta(delta)
    load = _load(events)
    candidates: list[tuple[float, Accountant]] = [
        (_renyi_epsilon(load.renyi, _order_share(delta)), "renyi-filter")
    ]
    if load.mu2 < math.inf:
        mu, share = math.sqrt(load.mu2), GAUSSIAN_SHARE * delta
        gaussian = _least_epsilon(lambda cap: _gaussian_delta(cap, mu), share, _loss_bound(load.mu2, share))
        candidates.append((gaussian, "gaussian-filter"))
    return min(candidates)


def fits_lifetime(spent: Sequence[Event], planned: Sequence[Event], epsilon: float, delta: float) -> bool:
    """Whether a lifetime cap of (ε, δ) lets a plan pass after what was spent.

    The first plan of all is chosen before anything was released, so the exact account may let it pass where
    the filters don't. The lifetime then ends with it, since the filters, which only count up, will refuse all
    that follows.
    """
    return how_many_more(spent, planned, epsilon, delta, most=1) == 1


def how_many_more(
    spent: Sequence[Event], planned: Sequence[Event], epsilon: float, delta: float, most: int = 1_000_000
) -> int:
    """Return how often a plan may still be carried out within a lifetime cap of (ε, δ); at most `most`."""
    _check_delta(delta)
    before, plan = _load(spent), _load(planned)
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        # Doubling first, so that few runs are found in few steps.
        middle = min(2 * fits + 1, (fits + too_many) // 2)
        passes = _passes(before + plan.times(middle), epsilon, delta)
        fits, too_many = (middle, too_many) if passes else (fits, middle)
    if fits == 0 and not spent and most >= 1:
        return int(_exact_fit(planned, epsilon, delta))
    return fits


def _exact_fit(planned: Sequence[Event], cap: float, delta: float) -> bool:
    return epsilon(planned, delta)[0] <= cap


@dataclass(frozen=True)
class _Load:
    """What adds up under the filters: Σ μ² (infinite once a step was sampled) and Σ ε_α for every order."""

    mu2: float
    renyi: tuple[float, ...]

    def __add__(self, other: "_Load") -> "_Load":
        return _Load(self.mu2 + other.mu2, tuple(a + b for a, b in zip(self.renyi, other.renyi, strict=True)))

    def times(self, count: int) -> "_Load":
        return _Load(self.mu2 * count, tuple(count * value for value in self.renyi))


def _load(events: Sequence[Event]) -> _Load:
    counts = tally(events)
    mu2 = math.inf if any(map(_sampled, counts)) else _gaussian_load(counts, of_counts=_count_mu)
    return _Load(mu2, _renyi(counts))


def _passes(load: _Load, epsilon: float, delta: float) -> bool:
    gaussian = load.mu2 < math.inf and _gaussian_delta(epsilon, math.sqrt(load.mu2)) <= GAUSSIAN_SHARE * delta
    return gaussian or _renyi_epsilon(load.renyi, _order_share(delta)) <= epsilon


def _order_share(delta: float) -> float:
    return (1 - GAUSSIAN_SHARE) * delta / len(ORDERS)


def _count_mu(a: float) -> float:
    return -2 * NormalDist().inv_cdf(1 / (1 + math.exp(a)))


def _gaussian_load(counts: Tally, *, of_counts: Callable[[float], float]) -> float:
    """Σ μ² of full-batch steps (μ = 1/σ) and of counts, whose μ is as the caller has it."""

    def mu(event: Event) -> float:
        return of_counts(event.epsilon) if isinstance(event, DiscreteLaplace) else 1 / event.noise_multiplier

    return math.fsum(count * mu(event) ** 2 for event, count in counts.items())


def _renyi(counts: Tally) -> tuple[float, ...]:
    """Σ ε_α for every order, the worse of both directions."""
    return tuple(
        math.fsum(count * _order(event, alpha) for event, count in counts.items()) for alpha in ORDERS
    )


@lru_cache(maxsize=4096)
def _order(event: Event, alpha: int) -> float:
    """Rényi divergence of order α of one step or count."""
    if isinstance(event, DiscreteLaplace):
        # Randomised response with odds e^a (Mironov 2017, proposition 5; arXiv:1702.07476).
        a = event.epsilon
        log_p, log_q = -math.log1p(math.exp(-a)), -a - math.log1p(math.exp(-a))
        terms = [alpha * log_p + (1 - alpha) * log_q, alpha * log_q + (1 - alpha) * log_p]
    elif event.sample_rate == 1:
        return alpha / (2 * event.noise_multiplier**2)
    else:
        # Mironov, Talwar & Zhang 2019, section 3.3 (arXiv:1908.10530): E[(1 − q + q·e^Z)^α], multiplied out.
        log_in, log_out = math.log(event.sample_rate), math.log1p(-event.sample_rate)
        terms = [
            math.lgamma(alpha + 1)
            - math.lgamma(k + 1)
            - math.lgamma(alpha - k + 1)
            + k * log_in
            + (alpha - k) * log_out
            + k * (k - 1) / (2 * event.noise_multiplier**2)
            for k in range(alpha + 1)
        ]
    most = max(terms)
    return max(0.0, most + math.log(math.fsum(math.exp(term - most) for term in terms))) / (alpha - 1)


def _renyi_epsilon(renyi: tuple[float, ...], delta: float) -> float:
    return max(
        0.0,
        min(
            value + math.log1p(-1 / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1)
            for alpha, value in zip(ORDERS, renyi, strict=True)
        ),
    )


# ---- Another opinion ---------------------------------------------------------------------------------------


def second_opinion(events: Sequence[Event], delta: float) -> tuple[float, Accountant]:
    """Return ε of these events by code and method that `epsilon` doesn't use, for `verify`.

    Numerical distributions stand against closed forms; Opacus's PRV accountant, an upper bound within 0.01,
    stands against numerical distributions. It takes seconds to import and knows no counts: their two-valued
    losses are mixed in.
    """
    _check_delta(delta)
    counts = tally(events)
    if not counts:
        return 0.0, "pld"
    if _closed_form(counts):
        return _pld_epsilon(tuple(counts.items()), delta), "pld"
    return math.inf if _out_of_reach(counts) else _prv_epsilon(counts, delta), "prv"


def _prv_epsilon(counts: Tally, delta: float) -> float:
    from opacus.accountants import PRVAccountant

    loss_error, delta_error = 0.01, delta / 1000
    accountant = PRVAccountant()
    accountant.history = [
        (event.noise_multiplier, event.sample_rate, count)
        for event, count in counts.items()
        if isinstance(event, GaussianSteps)
    ]
    shifts = _count_losses(counts) if _count_sums(counts) <= MOST_SUMS else [(_count_total(counts), 1.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ln(1 − q) at q = 1; orders of the bound that only sizes its grid
        losses = accountant._get_dprv(eps_error=loss_error, delta_error=delta_error)

    def profile(epsilon: float) -> float:
        return delta_error + math.fsum(
            chance * float(losses.compute_delta_estimate(epsilon - loss - loss_error))
            for loss, chance in shifts
        )

    return _least_epsilon(profile, delta, float(losses.domain.t_max))
