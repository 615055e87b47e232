"""What public data alone gives: the row that every result must stand beside.

Candidates differ in model and weight decay; the public validation cases choose, the public test cases judge.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from common.config import Network, RunConfig
from common.datasets import PublicData
from common.distillation import fit_labels
from common.summary import Metrics
from server.results import metrics_of
from server.teacher import NONE, Teacher, decays_beside


def public_baselines(config: RunConfig, public: PublicData) -> tuple[Metrics | None, Metrics | None]:
    """What the labelled proxy cases alone give, and what all of them would, had they been labelled."""
    hidden = public.proxy_labels
    had_it_been = None if hidden is None else best_public(config, public, hidden)
    return best_public(config, public, public.proxy.y), had_it_been


def best_public(config: RunConfig, public: PublicData, y_N: NDArray[np.int64]) -> Metrics | None:
    """Test scores of the best model that these proxy labels alone allow.

    Args:
        config: The run; its teacher's and student's architectures are the candidates.
        public: The public cases.
        y_N: A label for each proxy case, −1 where there is none.

    Returns:
        The scores, or None where no case is labelled.
    """
    labelled = np.flatnonzero(y_N >= 0)
    if not len(labelled):
        return None
    candidates = []
    for settings in _candidates(config):
        candidate = Teacher.open(config, public, np.empty(0, dtype=np.int32), settings)
        phi = candidate.learner.phi_public(public.proxy.x[labelled])
        fit_labels(candidate.learner, phi, y_N[labelled], settings, config.seed)
        candidates.append(candidate)
    return metrics_of(best_by_validation(candidates).test_scores())


def best_by_validation(candidates: Iterable[Teacher]) -> Teacher:
    """Choose by log-loss on the public validation cases: few cases show it better than a rank or a count."""
    return min(candidates, key=lambda candidate: candidate.validation_scores()["log_loss"])


def _candidates(config: RunConfig) -> list[Network]:
    """The run's architectures, each with its own weight decay and with the usual ones."""
    found = {(one.model, one.features): one for one in (config.student, config.teacher) if one.model != NONE}
    return [
        one.model_copy(update={"weight_decay": decay})
        for one in found.values()
        for decay in decays_beside(one.weight_decay)
    ]
