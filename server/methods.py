"""Methods: what the central state z becomes when a round's ensemble is in.

z holds the central model's logits on the proxy cases of this run. A method says what sites return, which rule
combines it by default, and how z advances:

| method | sites return | z becomes |
|---|---|---|
| `descent` | movement of logits by their private steps | z + v, where v ← momentum·v + ensemble |
| `oneshot` | logits after all the run's private steps, in one round | the ensemble of balanced students |
| `fedmd` | logits after their private steps | the ensemble (Li and Wang 2019, arXiv:1910.03581) |

`descent` is gradient descent on functions instead of weights: with linear students on the same features, and
nothing quantised, it takes the very steps of DP-FedSGD.

Where the noise is large, as with many small sites, a step that is right for few large ones overshoots. With
`aggregation.validated` the server tries each step whole, halved, quartered and not at all, v with it, and
takes the one whose teacher has the least log-loss on the public validation cases. Releases are there already,
so this is free of any budget. Since staying is among the choices, no round makes a linear teacher worse on
those cases, whoever has spoken in it. They also choose the weight decay of the teacher's start
(`server.teacher`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.config import MOST_STEPS, Aggregation, RunConfig
from common.errors import ConfigError
from common.plan import TERMS, Terms

Floats = NDArray[np.float64]

SHARES = (1.0, 0.5, 0.25, 0.0)
"""Of a step, that are tried where validation chooses; with none of it z stays, at rest."""
USUAL_DECAY = 0.9
"""Of the average that validation may choose, where `aggregation.averaging` names none."""


@dataclass(frozen=True)
class State:
    """What the server carries from round to round.

    Attributes:
        z_PC: Logits of the central model on the run's proxy cases.
        velocity_PC: Momentum of z.
        average_PC: Exponential average of z over the second half, once it has begun.
        best_PC: What the teacher learned in the round of the least validation log-loss, if `patience` asks.
    """

    z_PC: Floats
    velocity_PC: Floats
    average_PC: Floats | None = None
    best_PC: Floats | None = None

    @classmethod
    def start(cls, z_PC: NDArray[np.floating]) -> "State":
        """Begin at the teacher's logits, at rest."""
        return cls(np.asarray(z_PC, dtype=np.float64), np.zeros(z_PC.shape))

    def taught_PC(self, settings: Aggregation) -> Floats:
        """What the teacher learns in a round: the average where there is one and no choice, else z."""
        return self.z_PC if self.average_PC is None or settings.validated else self.average_PC

    def outcomes(self, settings: Aggregation) -> list[Floats]:
        """What the run may come to; the public validation cases choose where there are several."""
        average = [self.average_PC] if settings.validated and self.average_PC is not None else []
        best = [self.best_PC] if self.best_PC is not None else []
        return [self.taught_PC(settings), *average, *best]


@dataclass(frozen=True)
class Method:
    """One way to learn from an ensemble, on terms that sites agree to.

    Attributes:
        terms: What sites return, and the usual rule that combines it.
        advance: (state, ensemble_PC, round, config, share of the step) to the next state.
    """

    terms: Terms
    advance: Callable[[State, Floats, int, RunConfig, float], State]

    def candidates(
        self, state: State, ensemble_PC: Floats, round_number: int, config: RunConfig
    ) -> list[State]:
        """States that may come next; the public validation cases choose where there are several."""
        choice = config.aggregation.validated and self.terms.returns == "movement"
        shares = SHARES if choice else (1.0,)
        return [self.advance(state, ensemble_PC, round_number, config, share) for share in shares]


def method_of(config: RunConfig) -> Method:
    """Look the method up and check that the configuration fits it.

    Raises:
        ConfigError: if class weights are asked for movements, stacking for logits, or more steps than a round
            may have.
    """
    method = METHODS[config.method]
    if method.terms.returns == "movement" and config.aggregation.rule == "class-weighted":
        expected = f"another rule for {config.method!r}, whose sites return movements"
        raise ConfigError("run config", "aggregation.rule", "class-weighted", expected)
    if method.terms.returns == "logits" and config.aggregation.rule == "stacking":
        expected = f"another rule for {config.method!r}: stacking weighs movements"
        raise ConfigError("run config", "aggregation.rule", "stacking", expected)
    if config.schedule[1] > MOST_STEPS:
        most = MOST_STEPS // config.privacy.steps_per_round
        expected = f"at most {most}, since {config.method!r} takes all steps in one round"
        raise ConfigError("run config", "num-rounds", config.num_rounds, expected)
    return method


def stalled(losses: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` rounds brought no better log-loss than those before; 0 waits for ever."""
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def _descend(
    state: State, ensemble_PC: Floats, round_number: int, config: RunConfig, share: float = 1.0
) -> State:
    settings = config.aggregation
    velocity_PC = share * (settings.momentum * state.velocity_PC + ensemble_PC)
    z_PC = state.z_PC + velocity_PC
    average_PC = state.average_PC
    decay = settings.averaging or (USUAL_DECAY if settings.validated else 0.0)
    if decay and round_number > config.num_rounds // 2:
        average_PC = z_PC if average_PC is None else decay * average_PC + (1 - decay) * z_PC
    return replace(state, z_PC=z_PC, velocity_PC=velocity_PC, average_PC=average_PC)


def _adopt(
    state: State, ensemble_PC: Floats, round_number: int, config: RunConfig, share: float = 1.0
) -> State:
    del round_number, config, share
    return replace(state, z_PC=ensemble_PC)


METHODS = {
    "descent": Method(TERMS["descent"], _descend),
    "oneshot": Method(TERMS["oneshot"], _adopt),
    "fedmd": Method(TERMS["fedmd"], _adopt),
}
