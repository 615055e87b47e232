"""A run's plan: everything a site must know to price a run before it opens a record.

The plan is fixed before the first task and travels, whole, inside every task. A site reserves its events in
the ledger, refuses a second plan under the same study, and reports the plan's ε even if the run stops early.
All numbers that privacy depends on (σ, sample rate, steps, clipping norm) follow from it alone, never from
the private data.
"""

import hashlib
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.accounting import DiscreteLaplace, Event, GaussianSteps, Guarantee, calibrate, epsilon
from common.config import Delta, Epsilon, Fraction, Positive, RunConfig, SampleRate, Seed, Steps, Student

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")]
Hex256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Plan(BaseModel):
    """What every task of one run has in common.

    Attributes:
        study: The name under which sites approve and book the run.
        returns: `movement` of the student's logits by its private steps, or the `logits` themselves.
        histogram_share: Share of ε that buys the label histogram; 0 buys none.
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
    clipping_norm: Positive
    step_size: Positive
    epsilon: Epsilon
    delta: Delta
    unit: Literal["record", "patient"]
    histogram_share: Fraction
    codec: Literal["int8", "fp16", "fp32"]
    student: Student
    students: Literal["same", "mixed"]
    proxy_digest: Hex256
    classes: Annotated[int, Field(ge=2, le=10_000)]
    seed: Seed

    def canonical(self) -> bytes:
        """The plan's canonical JSON, the same on every machine."""
        # pydantic writes fields in the order of their definition and floats in their shortest exact form.
        return self.model_dump_json().encode()

    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical()).digest()

    def noise_multiplier(self) -> float:
        """σ of every private step, calibrated so that the whole run stays within (ε, δ)."""
        return _noise_multiplier(self)

    def purchases(self) -> tuple[Event, ...]:
        """Statistics bought once, in the first round."""
        return (DiscreteLaplace(epsilon=self.epsilon * self.histogram_share),) if self.histogram_share else ()

    def events(self) -> tuple[Event, ...]:
        """Everything the run does to the private records."""
        return (*self.purchases(), self._steps(self.rounds * self.steps_per_round))

    def task_events(self, round_number: int) -> tuple[Event, ...]:
        """What the task of one round does; the rounds together make `events`."""
        bought = self.purchases() if round_number == 1 else ()
        return (*bought, self._steps(self.steps_per_round))

    def guarantee(self, rounds: int | None = None) -> Guarantee:
        """The privacy guarantee of the run, or of its first `rounds` rounds."""
        steps = self.steps_per_round * (self.rounds if rounds is None else rounds)
        spent, accountant = epsilon((*self.purchases(), self._steps(steps)), self.delta)
        return Guarantee(
            epsilon=spent,
            delta=self.delta,
            unit=self.unit,
            adjacency="add-remove",
            accountant=accountant,
            horizon="run",
        )

    def _steps(self, steps: int) -> GaussianSteps:
        return GaussianSteps(self.noise_multiplier(), self.sample_rate, steps)


@lru_cache(maxsize=64)
def _noise_multiplier(plan: Plan) -> float:
    return calibrate(
        plan.epsilon,
        plan.delta,
        steps=plan.rounds * plan.steps_per_round,
        sample_rate=plan.sample_rate,
        spent=plan.purchases(),
    )


def plan_of(
    config: RunConfig, *, study: str, returns: str, buys_histogram: bool, proxy_digest: bytes, classes: int
) -> Plan:
    """Draw up the plan that a run configuration asks for."""
    privacy = config.privacy
    rounds, steps_per_round = config.schedule
    return Plan.model_validate(
        {
            "study": study,
            "method": config.method,
            "returns": returns,
            "rounds": rounds,
            "steps_per_round": steps_per_round,
            "sample_rate": privacy.sample_rate,
            "clipping_norm": privacy.clipping_norm,
            "step_size": privacy.step_size,
            "epsilon": privacy.epsilon,
            "delta": privacy.delta,
            "unit": privacy.unit,
            "histogram_share": privacy.histogram_share if buys_histogram else 0.0,
            "codec": config.codec,
            "student": config.student,
            "students": config.students,
            "proxy_digest": proxy_digest.hex(),
            "classes": classes,
            "seed": config.seed,
        }
    )
