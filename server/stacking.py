"""Stacking: labelled public cases say how much of its declared share a site's movement keeps.

Sites speak about proxy cases, whose labels they may know; the jury are the *validation* cases, which never
leave the server. What a movement says about them is read off what it says about the proxy cases, by ridge
regression on public features. Once a round, for each site k with the declared share d_k of all records:

1. its movement is cut to the median norm (weighted by declared sizes), so that nobody gains by being loud;
2. h_vk = ⟨∇ℓ_v, movement_k⟩ is the rate at which the log-loss ℓ of validation case v grows along it;
3. t_k = mean / standard error of h_vk over the cases: how surely the site does harm, free of any scale;
4. it keeps w_k = d_k · exp(−max(t_k, 0)²).

The ensemble is Σ w_k · movement_k, and the weights are a simplex: 1 − Σ w_k goes to staying where z is.
Nobody gets more than its declared share, so a site is never preferred for its noise having pleased the jury,
and what hostile sites lose is not handed to the others, whose noise it would raise. h is linear in the
movement, so Σ w_k · mean(h_k) is the slope of the convex log-loss along the ensemble, and a site that would
surely raise it adds little.

The idea of trusting updates by a server's own cases is from Cao et al. 2021, arXiv:2012.13995 (FLTrust),
which takes cosines between gradients where this takes the significance of a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from server.robust_rules import weighted_median

Floats = NDArray[np.float64]

RIDGE = 1e-3
"""Penalty on a feature's weight, relative to the features' mean variance."""
FEWEST = 2
"""Labelled validation cases without which there is no standard error."""


@dataclass(frozen=True)
class Jury:
    """The labelled validation cases, as far as movements on proxy cases say something about them.

    Attributes:
        reads_VP: Takes `logits_PC` on the run's proxy cases to logits on the validation cases.
        label_V: Their labels.
    """

    reads_VP: Floats
    label_V: NDArray[np.int64]

    @classmethod
    def seated(
        cls, phi_PD: NDArray[np.floating], phi_VD: NDArray[np.floating], label_V: NDArray[np.int64]
    ) -> "Jury":
        """Fit the ridge regression from the features of both kinds of cases; unlabelled ones don't judge."""
        labelled_V = label_V >= 0
        design_PD, asked_VD = _with_constant(phi_PD), _with_constant(phi_VD[labelled_V])
        gram_DD = design_PD.T @ design_PD
        penalty_D = np.full(len(gram_DD), RIDGE * (gram_DD.diagonal()[:-1].mean() or 1.0))
        penalty_D[-1] = 0.0  # the constant is free
        reads_VP = asked_VD @ np.linalg.solve(gram_DD + np.diag(penalty_D), design_PD.T)
        return cls(reads_VP, label_V[labelled_V])

    def harm(self, z_PC: Floats, movement_PC: NDArray[np.floating]) -> float:
        """How surely the log-loss grows along a movement from z: a t-statistic, positive for harm."""
        gradient_VC = softmax(self.reads_VP @ z_PC, axis=1)
        cases_V = np.arange(len(self.label_V))
        gradient_VC[cases_V, self.label_V] -= 1.0
        growth_V = (gradient_VC * (self.reads_VP @ movement_PC)).sum(axis=1)
        error = growth_V.std(ddof=1) / np.sqrt(len(growth_V))
        mean = growth_V.mean()
        if error <= 1e-12 * abs(mean):
            return float(np.sign(mean)) * np.inf if mean else 0.0
        return float(mean / error)


def stacked(
    movement_KPC: Sequence[NDArray[np.float32]], weight_K: Floats, jury: Jury, z_PC: Floats
) -> tuple[Floats, Floats]:
    """Combine movements by the weights that the jury leaves them.

    Returns:
        The ensemble `movement_PC`, and the weights `w_K`, whose missing rest to 1 is for staying.
    """
    norm_K = np.array([np.linalg.norm(one.astype(np.float64)) for one in movement_KPC])
    bound = weighted_median(norm_K, weight_K)
    share_K = weight_K / weight_K.sum()
    total_PC, kept_K = np.zeros(z_PC.shape), np.zeros(len(share_K))
    for k, movement_PC in enumerate(movement_KPC):
        cut_PC = movement_PC.astype(np.float64) * min(1.0, bound / max(norm_K[k], np.finfo(float).tiny))
        kept_K[k] = share_K[k] * np.exp(-(max(jury.harm(z_PC, cut_PC), 0.0) ** 2))
        total_PC += kept_K[k] * cut_PC
    return total_PC, kept_K


def _with_constant(phi_ND: NDArray[np.floating]) -> Floats:
    flat_ND = phi_ND.reshape(len(phi_ND), -1).astype(np.float64)
    return np.hstack([flat_ND, np.ones((len(flat_ND), 1))])
