"""Losses against their textbook formulas, written out naively."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.losses import (
    balanced_softmax_cross_entropy,
    distillation_loss,
    feature_matching_loss,
    log_soft_labels,
    soft_labels,
)

some_logits = arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(2, 4)), elements=st.floats(-50, 50, width=32)
)
temperatures = st.floats(0.05, 50)


@given(some_logits, temperatures)
def test_soft_labels_are_hintons_equation_1(logits_NC, temperature):
    found_NC = soft_labels(logits_NC, temperature)
    for logits_C, found_C in zip(logits_NC.astype(float), found_NC, strict=True):
        powers = [math.exp((z - logits_C.max()) / temperature) for z in logits_C]
        assert found_C == pytest.approx([power / sum(powers) for power in powers], abs=1e-6)


@given(arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32)), st.floats(1e-3, 1e3))
def test_log_soft_labels_stay_finite_where_probabilities_vanish(logits_NC, temperature):
    log_NC = log_soft_labels(logits_NC, temperature)
    assert np.isfinite(log_NC).all()
    assert log_NC.dtype == np.float32
    assert np.exp(log_NC.astype(float)).sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def test_distillation_loss_is_written_out():
    rng = np.random.default_rng(0)
    student_NC, teacher_NC = (rng.normal(size=(6, 3)).astype(np.float32) for _ in range(2))
    labels_N, temperature, alpha = np.array([0, -1, 2, -1, 1, 1]), 3.0, 0.7

    kl, ce = [], []
    for student_C, teacher_C, label in zip(student_NC, teacher_NC, labels_N, strict=True):
        p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum() for z in (teacher_C, student_C))
        kl.append(sum(p * np.log(p / q)))
        if label >= 0:
            ce.append(-np.log(np.exp(student_C)[label] / np.exp(student_C).sum()))
    expected = alpha * temperature**2 * np.mean(kl) + (1 - alpha) * np.mean(ce)

    found = distillation_loss(
        torch.from_numpy(student_NC),
        torch.from_numpy(log_soft_labels(teacher_NC, temperature)),
        torch.from_numpy(labels_N),
        temperature,
        alpha,
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_distillation_loss_is_zero_for_the_teacher_itself_and_needs_no_label():
    logits_NC = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    soft_NC = torch.from_numpy(log_soft_labels(logits_NC.numpy(), 2.0))
    unlabelled_N = torch.full((5,), -1)
    assert distillation_loss(logits_NC, soft_NC, unlabelled_N, 2.0, 0.5).item() == pytest.approx(
        0.0, abs=1e-6
    )


def test_a_high_temperature_matches_centred_logits():
    generator = torch.Generator().manual_seed(0)
    student_NC = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    teacher_NC = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    temperature = 1000.0
    soft_NC = torch.from_numpy(log_soft_labels(teacher_NC.numpy(), temperature))
    loss = distillation_loss(student_NC, soft_NC, torch.full((8,), -1), temperature, 1.0)
    difference_NC = student_NC - teacher_NC
    centred_NC = difference_NC - difference_NC.mean(dim=1, keepdim=True)
    matching = centred_NC.square().sum(dim=1).mean() / (2 * 5)
    assert loss.item() == pytest.approx(matching.item(), rel=1e-2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_no_temperature_but_a_positive_one(temperature):
    with pytest.raises(ValueError, match="temperature"):
        soft_labels(np.zeros((1, 2), np.float32), temperature)
    with pytest.raises(ValueError, match="temperature"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), temperature, 1.0)


def test_balanced_softmax_unlearns_a_prior():
    """Without evidence and at 9 : 1, a plain model ends at the prior, a balanced one at even odds."""
    labels_N = torch.tensor([0] * 90 + [1] * 10)
    log_prior_C = torch.tensor([0.9, 0.1]).log()
    fitted = {}
    for name, prior_C in {"plain": torch.zeros(2), "balanced": log_prior_C}.items():
        logits_C = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits_C], max_iter=100, line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer, logits_C=logits_C, prior_C=prior_C):
            optimizer.zero_grad()
            loss = balanced_softmax_cross_entropy(logits_C.expand(100, 2), labels_N, prior_C)
            loss.backward()
            return loss

        optimizer.step(closure)
        fitted[name] = logits_C.softmax(dim=0)[1].item()
    assert fitted["plain"] == pytest.approx(0.1, abs=1e-3)
    assert fitted["balanced"] == pytest.approx(0.5, abs=1e-3)


def test_feature_matching_is_half_the_squared_distance():
    student_ND, teacher_ND = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    assert feature_matching_loss(student_ND, teacher_ND).item() == pytest.approx(0.5 * (5 + 16) / 2)
    with pytest.raises(ValueError, match="shapes"):
        feature_matching_loss(student_ND, torch.zeros(2, 3))
