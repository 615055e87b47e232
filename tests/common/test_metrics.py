"""Scores against scikit-learn's own multi-class formulas and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from common.losses import soft_labels
from common.metrics import headline_metric, scores


def test_two_classes_by_hand():
    logits_NC = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 2.0]])
    found = scores(logits_NC, np.array([0, 0, 1, 1]))
    assert found["accuracy"] == 0.75
    # Of the four pairs (healthy, ill) one is a tie.
    assert found["auroc"] == pytest.approx(3.5 / 4)


@given(st.integers(2, 5), st.integers(0, 10_000))
def test_scores_agree_with_scikit_learn(classes, seed):
    rng = np.random.default_rng(seed)
    labels_N = np.concatenate([np.arange(classes), rng.integers(classes, size=40)])
    logits_NC = rng.normal(size=(len(labels_N), classes))
    probability_NC = soft_labels(logits_NC, 1.0)
    found = scores(logits_NC, labels_N)
    judged = probability_NC[:, 1] if classes == 2 else probability_NC
    assert found["auroc"] == pytest.approx(
        roc_auc_score(labels_N, judged, multi_class="ovr", average="macro")
    )
    assert found["log_loss"] == pytest.approx(log_loss(labels_N, probability_NC, labels=range(classes)))
    assert found["accuracy"] == pytest.approx((logits_NC.argmax(axis=1) == labels_N).mean())


def test_sure_logits_still_rank():
    logits_NC = np.array([[0.0, 100.0], [0.0, 200.0], [0.0, 300.0]], dtype=np.float32)
    assert scores(logits_NC, np.array([0, 1, 1]))["auroc"] == 1.0


def test_unlabelled_cases_are_left_out():
    logits_NC = np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    assert scores(logits_NC, np.array([0, 1, -1])) == scores(logits_NC[:2], np.array([0, 1]))


def test_auroc_needs_a_case_of_every_class():
    found = scores(np.eye(3), np.array([0, 1, 1]))
    assert set(found) == {"accuracy", "log_loss"}
    assert scores(np.eye(3), np.array([-1, -1, -1])) == {}


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="finite"):
        scores(np.array([[np.nan, 0.0]]), np.array([0]))
    with pytest.raises(ValueError, match="shape"):
        scores(np.zeros((2, 2)), np.array([0]))


def test_headline():
    assert headline_metric(["healthy", "ill"]) == "auroc"
    assert headline_metric(["a", "b", "c"]) == "accuracy"
