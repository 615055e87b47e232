"""Losses: how a model takes over what another thinks, and how it learns from uneven labels.

Everything that travels between server and sites is logits on public cases, made into *soft labels* at a
temperature T: p_c = exp(z_c/T) / Σ_c' exp(z_c'/T) (Hinton, Vinyals, Dean 2015, arXiv:1503.02531, equation
1). A higher T shows more of what a teacher thinks of the classes that it does not choose. In the limit of a
high T, distilling is matching centred logits by least squares (equations 2–4 there): T²·KL → ‖centred(z) −
centred(v)‖² / 2C.

Soft labels are made where an ensemble is formed, in NumPy; losses are minimised where a model is trained,
in torch.

Shapes: N cases, C classes, D features.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

Float = TypeVar("Float", bound=np.floating)


def soft_labels(logits_NC: NDArray[Float], temperature: float) -> NDArray[Float]:
    """Return the probabilities that logits stand for at a temperature (Hinton et al. 2015, equation 1).

    Args:
        logits_NC: Finite logits.
        temperature: T > 0.

    Raises:
        ValueError: if the temperature is not above 0.
    """
    probability_NC: NDArray[Float] = np.exp(log_soft_labels(logits_NC, temperature))
    return probability_NC


def log_soft_labels(logits_NC: NDArray[Float], temperature: float) -> NDArray[Float]:
    """Return the logarithms of `soft_labels`: finite also where a probability is too small to be one.

    Raises:
        ValueError: if the temperature is not above 0.
    """
    _check_temperature(temperature)
    # Float64, less the largest: no temperature makes this overflow.
    scaled_NC = (logits_NC - logits_NC.max(axis=-1, keepdims=True)).astype(np.float64) / temperature
    log_sum_N1 = np.log(np.exp(scaled_NC).sum(axis=-1, keepdims=True))
    log_soft_NC: NDArray[Float] = (scaled_NC - log_sum_N1).astype(logits_NC.dtype)
    return log_soft_NC


def distillation_loss(
    student_logits_NC: Tensor,
    teacher_log_soft_labels_NC: Tensor,
    labels_N: Tensor,
    temperature: float,
    alpha: float,
) -> Tensor:
    """Return α·T²·KL(teacher ‖ student) + (1−α)·CE, each a mean over the cases that it concerns.

    Hinton et al. 2015, §2. Gradients of soft labels shrink as 1/T², so the factor T² keeps the balance of
    the two parts when T is changed.

    Args:
        student_logits_NC: The student's logits at temperature 1.
        teacher_log_soft_labels_NC: The teacher's log soft labels at `temperature`.
        labels_N: Hard labels; −1 where a case has none. The second part is 0 if no case has one.
        temperature: T > 0.
        alpha: Share of the soft labels, from 0 to 1.

    Returns:
        A scalar.

    Raises:
        ValueError: if the temperature is not above 0.
    """
    _check_temperature(temperature)
    student_log_soft_labels_NC = log_softmax(student_logits_NC / temperature, dim=-1)
    soft = kl_div(
        student_log_soft_labels_NC, teacher_log_soft_labels_NC, reduction="batchmean", log_target=True
    )
    labelled_N = labels_N >= 0
    loss = alpha * temperature**2 * soft
    if alpha < 1 and bool(labelled_N.any()):
        loss = loss + (1 - alpha) * cross_entropy(student_logits_NC[labelled_N], labels_N[labelled_N])
    return loss


def balanced_softmax_cross_entropy(logits_NC: Tensor, labels_N: Tensor, log_prior_C: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits that were shifted by the log frequencies of the classes.

    Ren et al. 2020, arXiv:2007.10001, §3.1. A model trained so learns p(x | class) up to a constant
    instead of its site's mix of classes: its logits are those of a site with as many cases of every class,
    and can be combined with those of a site with another mix.

    Args:
        logits_NC: Logits.
        labels_N: Labels.
        log_prior_C: Log frequency of each class in training; finite.
    """
    return cross_entropy(logits_NC + log_prior_C, labels_N)


def feature_matching_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Return ½‖student − teacher‖², a mean over cases: features distilled from the teacher's.

    FitNets (Romero et al. 2015, arXiv:1412.6550, equation 3). Where the widths differ, the student's side
    goes through a linear regressor first, which is learned along and thrown away.

    Raises:
        ValueError: if the widths differ.
    """
    if student_ND.shape != teacher_ND.shape:
        raise ValueError(f"features of shapes {tuple(student_ND.shape)} and {tuple(teacher_ND.shape)}")
    return 0.5 * (student_ND - teacher_ND).square().sum(dim=1).mean()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, not {temperature}")
