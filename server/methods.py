"""Methods: what the central state z becomes when a round's ensemble is in.

z holds the central model's logits on the proxy cases of this run. A method says what sites return, which rule combines it by
default, and how z advances:

| method | sites return | z becomes |
|---|---|---|
| `descent` | movement of logits by their private steps | v ← momentum·v + mean; z ← z + v: gradient descent on functions instead of weights |
| `oneshot` | logits of a student trained at once | the class-weighted ensemble of balanced students (one round) |
| `fedmd` | logits after their private steps | their mean (Li and Wang 2019, arXiv:1910.03581) |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from common.config import RunConfig
from common.errors import ConfigError

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
    """One way to learn from an ensemble.

    Attributes:
        returns: What a release carries.
        rule: The aggregation rule that `aggregation.rule = "auto"` stands for.
        advance: (state, ensemble_PC, round, config) to the next state.
        one_round: Whether the method is over after its first round.
    """

    returns: str
    rule: str
    advance: Callable[[State, Floats, int, RunConfig], State]
    one_round: bool = False


def method_of(config: RunConfig) -> Method:
    """Look the method up and check that the configuration fits it.

    Raises:
        ConfigError: if a one-round method is asked for more rounds, or class weights for movements.
    """
    method = METHODS[config.method]
    if method.returns == "movement" and config.aggregation.rule == "class-weighted":
        raise ConfigError("run config", "aggregation.rule", "class-weighted", "a rule for movements: mean, trimmed-mean")
    if method.one_round and config.num_rounds != 1:
        raise ConfigError("run config", "num-rounds", config.num_rounds, f"1, since {config.method!r} has one round")
    return method


def rule_of(config: RunConfig) -> str:
    """The aggregation rule in force."""
    rule = config.aggregation.rule
    return METHODS[config.method].rule if rule == "auto" else rule


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
    "descent": Method("movement", "mean", _descend),
    "oneshot": Method("logits", "class-weighted", _adopt, one_round=True),
    "fedmd": Method("logits", "mean", _adopt),
}
