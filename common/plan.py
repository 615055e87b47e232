"""A run's plan: everything a site must know to price a run before it opens a record.

The plan is fixed before the first task and travels, whole, inside every task. A site reserves its events in
the ledger, refuses a second plan under the same study, and reports the plan's ε even if the run stops early.
All numbers that privacy depends on (σ, sample rate, steps, clipping norm) follow from it alone, never from
the private data.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.accounting import (
    LEAST_SIGMA,
    DiscreteLaplace,
    Event,
    GaussianSteps,
    Guarantee,
    calibrate,
    epsilon,
)
from common.config import (
    ClippingNorm,
    Delta,
    Epsilon,
    Fraction,
    Positive,
    RunConfig,
    SampleRate,
    Seed,
    Steps,
    Student,
)

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")]
Hex256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


LABEL_HISTOGRAM: Final = "label-histogram"
HOLD_OUT_ACCURACY: Final = "hold-out-accuracy"


@dataclass(frozen=True)
class Purchase:
    """A statistic that is bought on purpose: counts to which one unit adds at most 1 in all.

    They are released by the discrete Laplace mechanism, with one contribution a unit.

    Attributes:
        name: `label-histogram`, how often each label occurs, or `hold-out-accuracy`, how many of the patients
            that the site holds out its student judges rightly, and how many wrongly.
        round: When.
        epsilon: For how much.
        size: How many counts.
    """

    name: str
    round: int
    epsilon: float
    size: int


class Plan(BaseModel):
    """What every task of one run has in common.

    Attributes:
        study: The name under which sites approve and book the run.
        returns: `movement` of the student's logits by its private steps, or the `logits` themselves.
        histogram_share, hold_out_share: Shares of ε that buy statistics (`purchases`); 0 buys none.
        student: The student the coordinator proposes; a site may choose another.
        seed: Public randomness only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    study: Name
    method: Literal["descent", "oneshot", "fedmd"]
    returns: Literal["movement", "logits"]
    rounds: Steps
    steps_per_round: Steps
    sample_rate: SampleRate
    clipping_norm: ClippingNorm
    step_size: Positive
    epsilon: Epsilon
    delta: Delta
    unit: Literal["record", "patient"]
    histogram_share: Fraction
    hold_out_share: Fraction
    codec: Literal["int8", "int4", "int2", "int1", "fp16", "fp32"]
    student: Student
    students: Literal["same", "mixed"]
    proxy_digest: Hex256
    classes: Annotated[int, Field(ge=2, le=10_000)]
    seed: Seed

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.histogram_share + self.hold_out_share >= 1:
            raise ValueError("shares that leave something of ε for the private steps")
        return self

    def within(self, most_epsilon: float, most_rounds: int) -> "Plan":
        """The same plan for a site that gives less: its own ε, hence its own σ, and its own last round."""
        own = {"epsilon": min(self.epsilon, most_epsilon), "rounds": min(self.rounds, most_rounds)}
        return self.model_copy(update=own)

    def canonical(self) -> bytes:
        """The plan's canonical JSON, the same on every machine."""
        # pydantic writes fields in the order of their definition and floats in their shortest exact form.
        return self.model_dump_json().encode()

    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical()).digest()

    def noise_multiplier(self) -> float:
        """σ of every private step, calibrated so that the whole run stays within (ε, δ).

        Raises:
            UserError: if no σ that can be accounted for does.
        """
        steps = self.rounds * self.steps_per_round
        return _noise_multiplier(self.epsilon, self.delta, steps, self.sample_rate, self._counted())

    def is_as_noisy_as(self, least: float) -> bool:
        """Whether σ is at least `least`.

        With few sampled units a small σ does, and to find it takes dozens of prices, each slower than the
        last: one price at `least` tells that it would lie below.

        Raises:
            UserError: as `noise_multiplier`.
        """
        below = 0.99 * least  # by more than what σ is rounded up by
        if self.sample_rate < 1 and below > LEAST_SIGMA:
            steps = GaussianSteps(below, self.sample_rate, self.rounds * self.steps_per_round)
            if epsilon((*self._counted(), steps), self.delta)[0] <= self.epsilon:
                return False
        return self.noise_multiplier() >= least

    def purchases(self, round_number: int | None = None) -> tuple[Purchase, ...]:
        """The statistics that the run, or one of its rounds, buys, in the order of a release."""
        offered = (
            (self.histogram_share, LABEL_HISTOGRAM, 1, self.classes),
            (self.hold_out_share, HOLD_OUT_ACCURACY, self.rounds, 2),
        )
        bought = (
            Purchase(name, when, self.epsilon * share, size) for share, name, when, size in offered if share
        )
        return tuple(one for one in bought if round_number in (None, one.round))

    def events(self) -> tuple[Event, ...]:
        """Everything the run does to the private records."""
        return (*self._counted(), self._steps(self.rounds * self.steps_per_round))

    def task_events(self, round_number: int) -> tuple[Event, ...]:
        """What the task of one round does; the rounds together make `events`."""
        return (*self._counted(round_number), self._steps(self.steps_per_round))

    def guarantee(self, rounds: int | None = None) -> Guarantee:
        """The privacy guarantee of the run, or of its first `rounds` rounds."""
        steps = self.steps_per_round * (self.rounds if rounds is None else rounds)
        spent, accountant = epsilon((*self._counted(), self._steps(steps)), self.delta)
        return Guarantee(
            epsilon=spent,
            delta=self.delta,
            unit=self.unit,
            adjacency="add-remove",
            accountant=accountant,
            horizon="run",
        )

    def _counted(self, round_number: int | None = None) -> tuple[Event, ...]:
        return tuple(DiscreteLaplace(epsilon=one.epsilon) for one in self.purchases(round_number))

    def _steps(self, steps: int) -> GaussianSteps:
        return GaussianSteps(self.noise_multiplier(), self.sample_rate, steps)


@lru_cache(maxsize=64)
def _noise_multiplier(
    target: float, delta: float, steps: int, sample_rate: float, purchases: tuple[Event, ...]
) -> float:
    return calibrate(target, delta, steps=steps, sample_rate=sample_rate, spent=purchases)


@dataclass(frozen=True)
class Terms:
    """What a method asks of sites.

    Attributes:
        returns: What a release carries.
        rule: The aggregation rule that `aggregation.rule = "auto"` stands for.
    """

    returns: Literal["movement", "logits"]
    rule: Literal["mean", "class-weighted"]


TERMS: Mapping[str, Terms] = {
    "descent": Terms("movement", "mean"),
    "oneshot": Terms("logits", "class-weighted"),
    "fedmd": Terms("logits", "mean"),
}
"""By method; what else a method is stands in `server.methods`."""


def rule_of(config: RunConfig) -> str:
    """The aggregation rule in force."""
    rule = config.aggregation.rule
    return TERMS[config.method].rule if rule == "auto" else rule


def plan_of(config: RunConfig, *, study: str, proxy_digest: bytes, classes: int) -> Plan:
    """Draw up the plan that a run configuration asks for; only class weights need the label histogram."""
    privacy = config.privacy
    buys_histogram = rule_of(config) == "class-weighted"
    rounds, steps_per_round = config.schedule
    return Plan.model_validate(
        {
            "study": study,
            "method": config.method,
            "returns": TERMS[config.method].returns,
            "rounds": rounds,
            "steps_per_round": steps_per_round,
            "sample_rate": privacy.sample_rate,
            "clipping_norm": privacy.clipping_norm,
            "step_size": privacy.step_size,
            "epsilon": privacy.epsilon,
            "delta": privacy.delta,
            "unit": privacy.unit,
            "histogram_share": privacy.histogram_share if buys_histogram else 0.0,
            "hold_out_share": privacy.hold_out_share,
            "codec": config.codec,
            "student": config.student,
            "students": config.students,
            "proxy_digest": proxy_digest.hex(),
            "classes": classes,
            "seed": config.seed,
        }
    )
