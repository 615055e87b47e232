"""FedAUXfdp (Hoech et al. 2022, arXiv:2205.14960): one round of private linear heads on public features.

1. Each site fits two regularised logistic regressions on the student's frozen features: its *head* (which
   class?), regularised towards the public teacher's head, and its *certainty* (is a case like mine, or like
   the proxy's?).
2. Both are released once by the Gaussian mechanism (output perturbation).
3. On the proxy, the server weights each site's probabilities by its certainty of the case, and distils the
   ensemble into the student.

**Sensitivity.** Features get a constant and are scaled to 2-norm 1. The objectives divide by the declared
size m, never by n, and are λ-strongly convex in all that is fitted (Chaudhuri et al. 2011, lemma 7), so one
record more or less moves the minimiser by at most G/(m·λ), G being the largest gradient of one record's
loss: √2 for the head (‖p − e_y‖ ≤ √2), ½ for the certainty, whose private part weighs one half. The paper
bounds the exchange of a record; here one is added or removed, as everywhere. What the solver leaves of the
gradient is part of the bound.

λ is `student.weight-decay`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from torch import Tensor

from client.noise import PrivateRandomness
from common.accounting import GaussianSteps, Guarantee, calibrate, epsilon
from common.config import RunConfig
from common.errors import UserError
from server.teacher import NONE, Teacher, choose_cases
from simulations.baselines.bench import Bench, Outcome, Party
from simulations.baselines.weights import FLOAT32

Floats = NDArray[np.float64]

HEAD_GRADIENT, CERTAINTY_GRADIENT = np.sqrt(2.0), 0.5
TOLERANCE = 1e-7
"""Largest 2-norm of the gradient that the solver may leave."""
LEAST_CERTAINTY = 1e-8


@dataclass(frozen=True)
class Release:
    """What one site sends."""

    head_DC: Floats
    certainty_D: Floats


def fedauxfdp(config: RunConfig, bench: Bench) -> Outcome:
    """Fit, release, weight by certainty, distil: the whole method."""
    privacy, student = config.privacy, bench.untaught(config)
    # Two Gaussian mechanisms of the same multiplier, the head's and the certainty's.
    multiplier = calibrate(privacy.epsilon, privacy.delta, steps=2, sample_rate=1.0)
    spent, accountant = epsilon((GaussianSteps(multiplier, 1.0, 2),), privacy.delta)
    public_PD, start_DC = _rows(student.phi_P), _teachers_head(config, bench, student)
    total_PC, total_P1 = np.zeros((len(public_PD), start_DC.shape[1])), np.zeros((len(public_PD), 1))
    for party in bench.parties:
        said = _release(config, party, public_PD, start_DC, multiplier)
        certainty_P1 = expit(public_PD @ said.certainty_D)[:, None] + LEAST_CERTAINTY
        total_PC += certainty_P1 * softmax(public_PD @ said.head_DC, axis=1)
        total_P1 += certainty_P1
    student.learn(np.log(np.maximum(total_PC / total_P1, 1e-12)))
    heads = FLOAT32 * start_DC.size
    guarantee = Guarantee(spent, privacy.delta, privacy.unit, "add-remove", accountant, "run")
    return Outcome(student.test_scores(), guarantee, 1, heads + FLOAT32 * len(start_DC), heads)


def _release(
    config: RunConfig, party: Party, public_PD: Floats, start_DC: Floats, multiplier: float
) -> Release:
    randomness = PrivateRandomness.seeded("fedauxfdp", config.seed, party.name)
    taken = torch.from_numpy(party.units.sample(randomness, 1.0))  # one record a unit
    rows_ND, y_N = _rows(party.units.phi_ND[taken]), party.units.y_N[taken].numpy()
    size, decay = party.declared_size, config.student.weight_decay
    head_DC = fit_head(rows_ND, y_N, size, decay, start_DC)
    certainty_D = fit_certainty(rows_ND, public_PD, size, decay)
    return Release(
        _noised(head_DC, multiplier * sensitivity(HEAD_GRADIENT, size, decay), randomness),
        _noised(certainty_D, multiplier * sensitivity(CERTAINTY_GRADIENT, size, decay), randomness),
    )


def sensitivity(gradient: float, declared_size: int, decay: float) -> float:
    """How far one record more or less can move what the solver returns, in 2-norm."""
    return (gradient / declared_size + 2 * TOLERANCE) / decay


def fit_head(rows_ND: Floats, y_N: NDArray[np.int64], size: int, decay: float, start_DC: Floats) -> Floats:
    """Minimise Σ CE/size + ½·decay·‖W − start‖² over W (D, C)."""
    truth_NC = np.eye(start_DC.shape[1])[y_N]

    def objective(flat: Floats) -> tuple[float, Floats]:
        weights_DC = flat.reshape(start_DC.shape)
        log_p_NC = log_softmax(rows_ND @ weights_DC, axis=1)
        away_DC = weights_DC - start_DC
        loss = -(truth_NC * log_p_NC).sum() / size + 0.5 * decay * (away_DC**2).sum()
        gradient_DC = rows_ND.T @ (np.exp(log_p_NC) - truth_NC) / size + decay * away_DC
        return float(loss), gradient_DC.ravel()

    return _minimised(objective, start_DC.ravel()).reshape(start_DC.shape)


def fit_certainty(rows_ND: Floats, public_PD: Floats, size: int, decay: float) -> Floats:
    """Tell the site's cases from the proxy's: half the weight to each side, and ½·decay·‖w‖²."""

    def objective(w_D: Floats) -> tuple[float, Floats]:
        ours_N, theirs_P = rows_ND @ w_D, public_PD @ w_D
        loss = np.logaddexp(0, -ours_N).sum() / (2 * size) + np.logaddexp(0, theirs_P).mean() / 2
        gradient_D = -rows_ND.T @ expit(-ours_N) / (2 * size) + public_PD.T @ expit(theirs_P) / (
            2 * len(public_PD)
        )
        return float(loss + 0.5 * decay * w_D @ w_D), gradient_D + decay * w_D

    return _minimised(objective, np.zeros(public_PD.shape[1]))


def _minimised(objective: Callable[[Floats], tuple[float, Floats]], start: Floats) -> Floats:
    found = minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 0, "gtol": 1e-9}
    ).x
    if np.linalg.norm(objective(found)[1]) > TOLERANCE:
        raise UserError("fedauxfdp: a logistic regression did not converge: raise student.weight-decay")
    return np.asarray(found, dtype=np.float64)


def _teachers_head(config: RunConfig, bench: Bench, student: Teacher) -> Floats:
    """The public start: the teacher's logits on the proxy as a linear function of the rows."""
    classes = len(bench.public.proxy.preprocessing.classes)
    rows_PD = _rows(student.phi_P)
    if config.teacher.model == NONE:
        return np.zeros((rows_PD.shape[1], classes))
    cases_P = choose_cases(config, len(bench.public.proxy))
    logits_PC = Teacher.start(config, bench.public, cases_P).logits().astype(np.float64)
    logits_PC -= logits_PC.mean(axis=1, keepdims=True)
    gram_DD = rows_PD.T @ rows_PD / len(rows_PD) + 1e-6 * np.eye(rows_PD.shape[1])
    return np.asarray(np.linalg.solve(gram_DD, rows_PD.T @ logits_PC / len(rows_PD)))


def _rows(phi_ND: Tensor) -> Floats:
    """Features with a constant, each row of 2-norm 1."""
    flat_ND = phi_ND.flatten(1).double().numpy()
    rows_ND = np.concatenate([flat_ND, np.ones((len(flat_ND), 1))], axis=1)
    return np.asarray(rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True))


def _noised(fitted: Floats, deviation: float, randomness: PrivateRandomness) -> Floats:
    return np.asarray(randomness.noised(fitted.reshape(-1), deviation).reshape(fitted.shape), np.float64)
