"""The ensemble: how the sites' opinions become one.

A rule takes the contributions of one round, in the order of site names so that sums don't depend on who
answered first, and returns one `logits_PC`. Weights are declared public sizes or noisy label histograms
that were bought from the budget; true record counts never enter.

| rule | combines | withstands |
|---|---|---|
| `mean` | declared size by declared size | – |
| `class-weighted` | log-probabilities, each class by the noisy counts of that class | uneven labels |
| `trimmed-mean` | what is left of each value after cutting both ends | a few hostile sites |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from common.config import Aggregation

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Contribution:
    """What one site says in one round, admitted.

    Attributes:
        site: Its name.
        logits_PC: Its student's logits on the round's cases, or their movement.
        weight: Its declared public size.
        histogram_C: Its noisy label histogram, if one was bought.
    """

    site: str
    logits_PC: NDArray[np.float32]
    weight: float
    histogram_C: tuple[int, ...] = ()


LEAST_COUNT = 0.5
"""Noise may make a count negative; no weight is."""

Rule = Callable[[Sequence[Contribution], Aggregation], Floats]


def aggregate(rule: str, contributions: Sequence[Contribution], settings: Aggregation) -> Floats:
    """Combine at least one contribution into `logits_PC`.

    Raises:
        ValueError: if there is nothing to combine.
    """
    if not contributions:
        raise ValueError("an ensemble needs at least one contribution")
    return RULES[rule](sorted(contributions, key=lambda one: one.site), settings)


def mean(contributions: Sequence[Contribution], settings: Aggregation) -> Floats:
    """Mean weighted by declared sizes, accumulated in place."""
    del settings
    total_PC = np.zeros(contributions[0].logits_PC.shape)
    for one in contributions:
        total_PC += one.weight * one.logits_PC
    return total_PC / sum(one.weight for one in contributions)


def class_weighted(contributions: Sequence[Contribution], settings: Aggregation) -> Floats:
    """Σ over sites of w_kc · log p_kc, where w_kc is site k's share of all noisy counts of class c.

    A site that has seen most cases of a class has most say about it; one whose histogram never came counts as
    having seen none. Sharpened by `aggregation.temperature`.
    """
    cases, classes = contributions[0].logits_PC.shape
    total_PC, unseen_C = np.zeros((cases, classes)), (0,) * classes
    counts_KC = np.maximum([one.histogram_C or unseen_C for one in contributions], LEAST_COUNT)
    # Who claims more cases than the size it declared gets no more say than that size.
    weight_K1 = np.array([[one.weight] for one in contributions])
    counts_KC = counts_KC * np.minimum(1.0, weight_K1 / counts_KC.sum(axis=1, keepdims=True))
    share_KC = counts_KC / counts_KC.sum(axis=0)
    for one, share_C in zip(contributions, share_KC, strict=True):
        total_PC += share_C * log_softmax(one.logits_PC.astype(np.float64), axis=1)
    return total_PC / settings.temperature


def trimmed_mean(contributions: Sequence[Contribution], settings: Aggregation) -> Floats:
    """Mean of each value over sites without the share `aggregation.trim` at each end.

    Yin et al. 2018, arXiv:1803.01498, definition 2.
    """
    stacked_KPC = np.sort(np.stack([one.logits_PC for one in contributions]).astype(np.float64), axis=0)
    sites = len(contributions)
    cut = min(int(np.ceil(settings.trim * sites)), (sites - 1) // 2)
    kept_PC: Floats = stacked_KPC[cut : sites - cut].mean(axis=0)
    return kept_PC


RULES: dict[str, Rule] = {"mean": mean, "class-weighted": class_weighted, "trimmed-mean": trimmed_mean}
