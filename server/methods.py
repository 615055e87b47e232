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
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.config import MOST_STEPS, RunConfig
from common.errors import ConfigError
from common.plan import TERMS, Terms

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """What the server carries from round to round.

    Attributes:
        z_PC: Logits of the central model on the run's proxy cases.
        velocity_PC: Momentum of z.
        average_PC: Exponential average of z over the second half, once it has begun.
    """

    z_PC: Floats
    velocity_PC: Floats
    average_PC: Floats | None = None

    @classmethod
    def start(cls, z_PC: NDArray[np.floating]) -> "State":
        """Begin at the teacher's logits, at rest."""
        return cls(np.asarray(z_PC, dtype=np.float64), np.zeros(z_PC.shape))

    @property
    def taught_PC(self) -> Floats:
        """What the teacher learns: the average where there is one, else z."""
        return self.z_PC if self.average_PC is None else self.average_PC


@dataclass(frozen=True)
class Method:
    """One way to learn from an ensemble, on terms that sites agree to.

    Attributes:
        terms: What sites return, and the usual rule that combines it.
        advance: (state, ensemble_PC, round, config) to the next state.
    """

    terms: Terms
    advance: Callable[[State, Floats, int, RunConfig], State]


def method_of(config: RunConfig) -> Method:
    """Look the method up and check that the configuration fits it.

    Raises:
        ConfigError: if class weights are asked for movements, or more steps than a round may have.
    """
    method = METHODS[config.method]
    if method.terms.returns == "movement" and config.aggregation.rule == "class-weighted":
        expected = f"mean or trimmed-mean for {config.method!r}, whose sites return movements"
        raise ConfigError("run config", "aggregation.rule", "class-weighted", expected)
    if config.schedule[1] > MOST_STEPS:
        most = MOST_STEPS // config.privacy.steps_per_round
        expected = f"at most {most}, since {config.method!r} takes all steps in one round"
        raise ConfigError("run config", "num-rounds", config.num_rounds, expected)
    return method


def _descend(state: State, ensemble_PC: Floats, round_number: int, config: RunConfig) -> State:
    velocity_PC = config.aggregation.momentum * state.velocity_PC + ensemble_PC
    z_PC = state.z_PC + velocity_PC
    average_PC = state.average_PC
    decay = config.aggregation.averaging
    if decay and round_number > config.num_rounds // 2:
        average_PC = z_PC if average_PC is None else decay * average_PC + (1 - decay) * z_PC
    return State(z_PC, velocity_PC, average_PC)


def _adopt(state: State, ensemble_PC: Floats, round_number: int, config: RunConfig) -> State:
    del round_number, config
    return replace(state, z_PC=ensemble_PC)


METHODS = {
    "descent": Method(TERMS["descent"], _descend),
    "oneshot": Method(TERMS["oneshot"], _adopt),
    "fedmd": Method(TERMS["fedmd"], _adopt),
}
