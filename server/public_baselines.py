"""What public data alone gives: the row that every result must stand beside.

Candidates differ in model and weight decay; the public validation cases choose, the public test cases judge.
"""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from common.config import Network, RunConfig
from common.datasets import PublicData
from common.distillation import fit_labels
from common.metrics import headline_metric
from common.summary import Metrics
from server.results import metrics_of
from server.teacher import NONE, Teacher

WEIGHT_DECAYS = (1e-3, 1e-2, 1e-1)


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
    metric = headline_metric(public.proxy.preprocessing.classes)
    best: tuple[float, dict[str, float]] = (-1.0, {})
    for settings, decay in product(_architectures(config), WEIGHT_DECAYS):
        candidate = Teacher.open(config, public, np.empty(0, dtype=np.int32), settings)
        phi = candidate.learner.phi_public(public.proxy.x[labelled])
        tuned = settings.model_copy(update={"weight_decay": decay})
        fit_labels(candidate.learner, phi, y_N[labelled], tuned, config.seed)
        chosen_by = candidate.validation_scores().get(metric, 0.0)
        if chosen_by > best[0]:
            best = (chosen_by, candidate.test_scores())
    return metrics_of(best[1])


def _architectures(config: RunConfig) -> list[Network]:
    found = {(one.model, one.features): one for one in (config.student, config.teacher) if one.model != NONE}
    return list(found.values())
