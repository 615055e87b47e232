"""How good logits are, in the numbers that every result is given in.

Shapes: N cases, C classes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, roc_auc_score

from common.losses import log_soft_labels


def headline_metric(classes: Sequence[str]) -> str:
    """Return the metric that comes first: `auroc` for a yes or no, `accuracy` for more classes."""
    return "auroc" if len(classes) == 2 else "accuracy"


def scores(logits_NC: NDArray[np.floating], labels_N: NDArray[np.integer]) -> dict[str, float]:
    """Judge logits by labels.

    Args:
        logits_NC: Finite logits.
        labels_N: Labels; cases with −1 are left out.

    Returns:
        `accuracy` (ties go to the first class), `log_loss` (nats a case), and `auroc`: of the second class
        for two classes, else the mean over classes of one against the rest. `auroc` is left out where a
        class has no case, since it isn't defined then; where no case is labelled, nothing is returned.

    Raises:
        ValueError: if a logit isn't finite or the shapes don't fit.
    """
    if logits_NC.ndim != 2 or labels_N.shape != logits_NC.shape[:1]:
        raise ValueError(f"logits of shape {logits_NC.shape} don't fit labels of shape {labels_N.shape}")
    if not np.isfinite(logits_NC).all():
        raise ValueError("a logit is not finite")
    labelled_N = labels_N >= 0
    judged_NC, truth_N = logits_NC[labelled_N].astype(np.float64), labels_N[labelled_N]
    if not len(truth_N):
        return {}
    found = {
        "accuracy": float(accuracy_score(truth_N, judged_NC.argmax(axis=1))),
        "log_loss": float(log_losses(judged_NC, truth_N).mean()),
    }
    if len(np.unique(truth_N)) == judged_NC.shape[1]:
        found["auroc"] = float(np.mean([_auroc(judged_NC, truth_N, c) for c in range(judged_NC.shape[1])]))
    return found


def log_losses(logits_NC: NDArray[np.floating], labels_N: NDArray[np.integer]) -> NDArray[np.float64]:
    """Each labelled case's log-loss, in nats."""
    labelled_N = labels_N >= 0
    judged_NC, truth_N = logits_NC[labelled_N].astype(np.float64), labels_N[labelled_N]
    losses_N: NDArray[np.float64] = -log_soft_labels(judged_NC, 1.0)[np.arange(len(truth_N)), truth_N]
    return losses_N


def _auroc(logits_NC: NDArray[np.float64], labels_N: NDArray[np.integer], c: int) -> float:
    """Class c against the rest. With two classes it is the same for both."""
    # Log-odds rank as probabilities do, but don't tie where those round to 1.
    log_odds_N = logits_NC[:, c] - np.logaddexp.reduce(np.delete(logits_NC, c, axis=1), axis=1)
    return float(roc_auc_score(labels_N == c, log_odds_N))
