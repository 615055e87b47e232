"""Baselines that send what models think of public cases: FedMD and DS-FL.

Every round the server sends a consensus on the run's proxy cases; each site fits it, takes private steps,
and returns its opinion on the same cases. Both travel in the run's codec, as the federation's opinions do.
Opinions are weighted by declared sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from client.noise import PrivateRandomness
from common.codec import CODECS, Codec
from common.config import RunConfig
from common.losses import soft_labels
from simulations.baselines.bench import Bench, Outcome, plan_alone, take_steps

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Exchange:
    """What one method says about public cases.

    Attributes:
        speak: A site's logits to what it sends.
        agree: The weighted mean of what was sent, and the run config, to the consensus, as logits.
    """

    speak: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    agree: Callable[[Floats, RunConfig], Floats]


@dataclass(frozen=True)
class Wire:
    """What travels one way, and how long each message was in bytes."""

    codec: Codec
    lengths: list[int] = field(default_factory=list)

    def carry(self, logits_PC: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what arrives."""
        scale, payload = self.codec.encode(logits_PC)
        self.lengths.append(len(payload))
        return self.codec.decode(payload, scale, *logits_PC.shape)


def fedmd(config: RunConfig, bench: Bench) -> Outcome:
    """FedMD (Li and Wang 2019, arXiv:1910.03581, algorithm 1), plain as published.

    Sites send class scores (logits), the consensus is their mean; *digest* is the fit, *revisit* the private
    steps. The transfer learning before the first round is the teacher's start.
    """
    return _exchange_labels(config, bench, Exchange(lambda logits_PC: logits_PC, lambda mean_PC, _: mean_PC))


def ds_fl(config: RunConfig, bench: Bench) -> Outcome:
    """DS-FL with entropy reduction aggregation (Itahara et al. 2021, arXiv:2008.06180, §4).

    Sites send probabilities; the consensus is softmax(mean / T) with T below 1 (`aggregation.temperature`;
    0.1 in the paper): averaging blurs what sites with different patients think, a low T sharpens it again.
    """

    def sharpened(mean_PC: Floats, config: RunConfig) -> Floats:
        return mean_PC / config.aggregation.temperature

    return _exchange_labels(config, bench, Exchange(lambda logits_PC: soft_labels(logits_PC, 1.0), sharpened))


def _exchange_labels(config: RunConfig, bench: Bench, method: Exchange) -> Outcome:
    plan, student = plan_alone(config), bench.taught(config)
    # A site's own weights, which for a model that isn't linear go on from round to round.
    states = {party.name: student.learner.state() for party in bench.parties}
    consensus_PC = student.logits().astype(np.float64)
    up, down = Wire(CODECS[config.codec]), Wire(CODECS[config.codec])
    for round_number in range(1, plan.rounds + 1):
        heard_PC = down.carry(consensus_PC.astype(np.float32)).astype(np.float64)
        mean_PC = np.zeros(consensus_PC.shape)
        for party in bench.parties:
            student.learner.restore(states[party.name])
            student.learn(heard_PC)
            randomness = PrivateRandomness.seeded("labels", config.seed, party.name, round_number)
            take_steps(student.learner.model, party, plan, plan.steps_per_round, randomness)
            states[party.name] = student.learner.state()
            mean_PC += bench.weights[party.name] * up.carry(method.speak(student.logits()))
        consensus_PC = method.agree(mean_PC, config)
    student.learn(consensus_PC)
    mean_up, mean_down = float(np.mean(up.lengths)), float(np.mean(down.lengths))
    return Outcome(student.test_scores(), plan.guarantee(), plan.rounds, mean_up, mean_down)
