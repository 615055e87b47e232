"""Stacking: the jury reads movements rightly, its weights are a simplex, and harm is silenced."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from server.robust_rules import weighted_median
from server.stacking import Jury, stacked

CASES, JURORS, FEATURES, CLASSES = 30, 40, 4, 3


def scene(seed: int = 0) -> tuple[Jury, np.ndarray, np.ndarray, np.ndarray]:
    """A jury, z = 0, and the movements of linear students: towards the truth, and anywhere."""
    rng = np.random.default_rng(seed)
    phi_PD, phi_VD = rng.normal(size=(CASES, FEATURES)), rng.normal(size=(JURORS, FEATURES))
    truth_DC = rng.normal(size=(FEATURES, CLASSES))
    labels_V = (phi_VD @ truth_DC).argmax(axis=1)
    good_PC = 0.1 * phi_PD @ truth_DC
    good_PC -= good_PC.mean(axis=1, keepdims=True)
    anywhere_PC = 0.1 * phi_PD @ rng.normal(size=(FEATURES, CLASSES))
    return Jury.seated(phi_PD, phi_VD, labels_V), np.zeros((CASES, CLASSES)), good_PC, anywhere_PC


def test_the_jury_reads_a_linear_movement_as_it_is():
    rng = np.random.default_rng(1)
    phi_PD, phi_VD = rng.normal(size=(CASES, FEATURES)), rng.normal(size=(JURORS, FEATURES))
    weight_DC, bias_C = rng.normal(size=(FEATURES, CLASSES)), rng.normal(size=CLASSES)
    jury = Jury.seated(phi_PD, phi_VD, np.zeros(JURORS, dtype=np.int64))
    np.testing.assert_allclose(
        jury.reads_VP @ (phi_PD @ weight_DC + bias_C), phi_VD @ weight_DC + bias_C, atol=0.02
    )


def test_unlabelled_cases_do_not_judge():
    label_V = np.where(np.arange(JURORS) % 2, 1, -1)
    jury = Jury.seated(np.ones((CASES, 1)), np.ones((JURORS, 1)), label_V)
    assert len(jury.label_V) == len(jury.reads_VP) == JURORS // 2


def test_harm_has_the_sign_of_what_the_log_loss_does():
    for seed in range(20):
        jury, z_PC, _, anywhere_PC = scene(seed)
        step_PC = 1e-4 * anywhere_PC

        def loss(at_PC, jury=jury):
            log_p_VC = log_softmax(jury.reads_VP @ at_PC, axis=1)
            return -log_p_VC[np.arange(len(jury.label_V)), jury.label_V].mean()

        grows = loss(z_PC + step_PC) - loss(z_PC - step_PC)
        assert np.sign(jury.harm(z_PC, anywhere_PC)) == np.sign(grows)


def test_good_sites_keep_their_share_and_what_hostile_ones_lose_is_for_staying():
    jury, z_PC, good_PC, _ = scene()
    said = [good_PC.astype(np.float32)] * 3 + [-good_PC.astype(np.float32)] * 2
    ensemble_PC, weight_K = stacked(said, np.array([1.0, 1, 2, 2, 2]), jury, z_PC)
    np.testing.assert_allclose(weight_K, [1 / 8, 1 / 8, 1 / 4, 0, 0], atol=1e-3)
    np.testing.assert_allclose(ensemble_PC, good_PC / 2, atol=1e-3)


@given(seed=st.integers(0, 10_000), sites=st.integers(1, 6), loud=st.floats(1e-3, 1e3))
def test_weights_are_a_simplex_under_the_declared_shares_and_nobody_is_loud(seed, sites, loud):
    jury, z_PC, _, _ = scene(seed)
    rng = np.random.default_rng(seed)
    said = [rng.normal(size=(CASES, CLASSES)).astype(np.float32) for _ in range(sites)]
    said[0] = np.float32(loud) * said[0]
    declared_K = rng.integers(1, 500, sites).astype(float)
    ensemble_PC, weight_K = stacked(said, declared_K, jury, z_PC)
    assert (weight_K >= 0).all() and (weight_K <= declared_K / declared_K.sum() + 1e-12).all()
    bound = weighted_median(np.array([np.linalg.norm(one.astype(np.float64)) for one in said]), declared_K)
    assert np.linalg.norm(ensemble_PC) <= bound * weight_K.sum() * (1 + 1e-6) + 1e-9


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([2.0**-10, 2.0, 2.0**10]))
def test_harm_is_free_of_scale(seed, scale):
    jury, z_PC, _, anywhere_PC = scene(seed)
    assert jury.harm(z_PC, scale * anywhere_PC) == pytest.approx(jury.harm(z_PC, anywhere_PC), rel=1e-6)


def test_a_site_that_says_nothing_harms_nobody():
    jury, z_PC, _, _ = scene()
    assert jury.harm(z_PC, np.zeros_like(z_PC)) == 0.0
    ensemble_PC, weight_K = stacked([np.zeros((CASES, CLASSES), np.float32)], np.ones(1), jury, z_PC)
    assert weight_K == [1.0] and not ensemble_PC.any()
