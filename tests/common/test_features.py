"""Features are a function of public bytes, a PCA by any other name, and frozen."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfTransformer
from torch import nn

import common.features
from common.errors import ConfigError, UserError
from common.features import (
    ROW_NORM,
    WHITENING,
    FeaturedModel,
    Projection,
    above_trunk,
    fit_features,
    load_featured_model,
)
from common.models import ModelCard, build, load_model, save_model, trunk_of

rng = np.random.default_rng(0)
IMAGES = rng.random((40, 1, 28, 28), dtype=np.float32)
TABLE = (rng.normal(size=(60, 9)) * np.arange(1, 10)).astype(np.float32)
TEXTS = rng.integers(0, 30, size=(50, 1, 12)).astype(np.float32)
TRUNK = trunk_of(build("cnn", (1, 28, 28), 10, seed=0)).requires_grad_(False)


def above(trunk, layers="head"):
    return above_trunk(fit_features("none", IMAGES, 1, 0), trunk, layers, IMAGES, 4, 0)


@settings(deadline=None)
@given(st.integers(5, 30), st.integers(2, 30), st.integers(1, 40), st.integers(0, 1000))
def test_the_projection_is_a_scaled_pca(cases, width, size, seed):
    """Wide or tall, it agrees with scikit-learn's PCA but for signs and the scale of each direction."""
    raw_NR = np.random.default_rng(seed).normal(size=(cases, width)) * np.arange(1, width + 1)
    columns = min(size, width, cases - 1)
    phi_NK = Projection.fit(torch.from_numpy(raw_NR), size)(torch.from_numpy(raw_NR).float()).numpy()
    assert phi_NK.shape == (cases, columns)
    pca = PCA(columns, svd_solver="full").fit(raw_NR)
    scores_NK = pca.transform(raw_NR)
    expected_NK = scores_NK / scores_NK.std(axis=0) ** WHITENING
    expected_NK *= ROW_NORM / np.sqrt((expected_NK**2).sum(axis=1).mean())
    assert np.abs(phi_NK) == pytest.approx(np.abs(expected_NK), abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "proxy_x", "shape"),
    [
        ("none", TABLE, (9,)),
        ("none", IMAGES, (1, 28, 28)),
        ("pca", TABLE, (4,)),
        ("pca", IMAGES, (4,)),
        ("scattering", IMAGES, (4,)),
        ("none", TEXTS, (1, 12)),
        ("words", TEXTS, (4,)),
    ],
)
def test_every_kind(kind, proxy_x, shape):
    features = fit_features(kind, proxy_x, 4, seed=0)
    phi = features.transform(proxy_x)
    assert features.shape == shape
    assert phi.shape == (len(proxy_x), *shape)
    assert phi.dtype == torch.float32
    assert not phi.requires_grad
    if kind == "none":
        assert np.array_equal(phi.numpy(), proxy_x)
    else:
        assert phi.square().sum(dim=1).mean().sqrt().item() == pytest.approx(ROW_NORM, rel=1e-3)
        assert phi.mean(dim=0).abs().max() < 1e-3
    assert features.transform(proxy_x[:0]).shape == (0, *shape)


def test_a_narrow_table_keeps_what_it_has():
    assert fit_features("pca", TABLE, 128, seed=0).shape == (9,)
    twice = np.concatenate([TABLE, TABLE], axis=1)
    assert fit_features("pca", twice, 128, seed=0).shape == (9,)


FIT_ALONE = """
import sys, hashlib, numpy as np, torch
torch.set_num_threads(1)
from common.features import fit_features
images = np.random.default_rng(0).random((40, 1, 28, 28), dtype=np.float32)
torch.manual_seed(int(sys.argv[1]))
features = fit_features("scattering", images, 8, seed=int(sys.argv[1]))
print(features.name, hashlib.sha256(features.transform(images).numpy().tobytes()).hexdigest())
"""


def test_two_sites_fit_the_same_bits():
    """Two processes, other seeds, the same proxy: the same features to the last bit."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", FIT_ALONE, seed], env=environment, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second


def test_a_process_fits_once():
    first = fit_features("pca", TABLE, 4, seed=0)
    assert fit_features("pca", TABLE.copy(), 4, seed=1) is first
    assert fit_features("pca", TABLE + 1, 4, seed=0) is not first
    assert fit_features("pca", TABLE, 3, seed=0) is not first
    other_trunk = trunk_of(build("cnn", (1, 28, 28), 10, seed=1))
    ours, same, theirs = (above(trunk) for trunk in (TRUNK, copy.deepcopy(TRUNK), other_trunk))
    assert ours is same and ours.name != theirs.name


def test_public_cases_are_looked_at_once_and_private_ones_leave_no_copy():
    features = fit_features("pca", TABLE, 4, seed=0)
    assert features.transform_public(TABLE) is features.transform_public(TABLE.copy())
    assert torch.equal(features.transform_public(TABLE), features.transform(TABLE))
    assert features.transform(TABLE) is not features.transform(TABLE)


def test_a_large_proxy_is_looked_at_by_a_seeded_part(monkeypatch):
    monkeypatch.setattr(common.features, "FIT_CASES", 30)
    first, again, other = (fit_features("pca", TABLE * 2, 4, seed=seed) for seed in (0, 0, 1))
    assert again is first
    assert other.name != first.name
    assert not torch.equal(other.projection.directions, first.projection.directions)


def test_the_scale_of_pixels_does_not_matter():
    small, large = (fit_features("scattering", IMAGES * np.float32(c), 8, seed=0) for c in (1, 255))
    phi = [small.transform(IMAGES), large.transform(IMAGES * np.float32(255))]
    assert torch.allclose(*phi, atol=1e-2)


def test_features_are_frozen():
    features = above(nn.Sequential(*TRUNK, nn.Dropout(0.5)))
    model = FeaturedModel(features, build("linear", features.shape, 3, seed=0)).train()
    assert not features.training
    assert not any(module.training for module in features.modules())
    assert [name for name, weights in model.named_parameters() if weights.requires_grad] == [
        "model.head.weight",
        "model.head.bias",
    ]
    before = features.transform(IMAGES)
    assert features.raw[1][0] is not TRUNK[0]
    assert torch.equal(features.transform(IMAGES), before)


def test_read_only_cases_are_no_obstacle():
    frozen = TABLE.copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_features("pca", frozen, 5, seed=0).transform(frozen)


@pytest.mark.parametrize(
    ("kind", "proxy_x", "complaint"),
    [
        ("scatter", IMAGES, r"one of none, pca, scattering, words; did you mean 'scattering'\?"),
        ("pca", TEXTS, "words, or model = text with features = none"),
        ("words", TABLE, r"none or pca for cases of shape \(9,\): it takes texts"),
        ("scattering", TABLE, r"none or pca for cases of shape \(9,\): it takes images"),
        ("pca", np.ones((5, 3), np.float32), "all alike"),
        ("pca", np.full((5, 3), 0.1, np.float32), "all alike"),
        ("scattering", np.zeros((5, 1, 28, 28), np.float32), "all alike"),
    ],
)
def test_refusals(kind, proxy_x, complaint):
    with pytest.raises(UserError, match=complaint) as refusal:
        fit_features(kind, proxy_x, 4, seed=0)
    assert isinstance(refusal.value, ConfigError) == ("alike" not in complaint)


def test_above_a_trunk_a_head_sees_components_and_a_block_what_the_trunk_makes():
    head, block = above(TRUNK), above(TRUNK[:4], "last-block")
    assert head.shape == (4,) and block.shape == (16, 14, 14)
    x = torch.from_numpy(IMAGES)
    assert head.transform(IMAGES).square().sum(dim=1).mean().sqrt().item() == pytest.approx(
        ROW_NORM, rel=1e-3
    )
    assert torch.equal(block.transform(IMAGES), TRUNK[:4](x))


def test_words_are_an_lsa():
    """Components of scikit-learn's tf-idf of the pieces that a text has, but for signs and scales."""
    has_NV = np.zeros((len(TEXTS), 30))
    for row, ids in zip(has_NV, TEXTS[:, 0].astype(int), strict=True):
        row[ids] = 1
    has_NV[:, 0] = 0  # padding
    tfidf_NV = TfidfTransformer().fit_transform(has_NV).toarray()
    scores_NK = PCA(4, svd_solver="full").fit_transform(tfidf_NV)
    phi_NK = fit_features("words", TEXTS, 4, seed=0).transform(TEXTS).numpy()
    both_KN = np.corrcoef(phi_NK.T, scores_NK.T)
    assert np.abs(both_KN[:4, 4:]) == pytest.approx(np.eye(4), abs=1e-3)


def test_a_student_of_texts_comes_back_from_disk_with_its_words(tmp_path):
    features = fit_features("words", TEXTS, 4, seed=0)
    student = FeaturedModel(features, build("linear", features.shape, 3, seed=0))
    nn.init.normal_(student.model.head.weight)
    card = ModelCard(model="linear", case_shape=(1, 12), classes=("a", "b", "c"), features=features.card())
    save_model(tmp_path / "student.safetensors", student, card)
    found, _ = load_featured_model(tmp_path / "student.safetensors")
    assert torch.equal(found.eval()(torch.from_numpy(TEXTS)), student.eval()(torch.from_numpy(TEXTS)))


@pytest.mark.parametrize("kind", ["none", "pca", "scattering"])
def test_a_student_comes_back_from_disk_with_its_features(tmp_path, kind):
    features = fit_features(kind, IMAGES, 4, seed=0)
    head = build("mlp", features.shape, 3, seed=0)
    student = head if kind == "none" else FeaturedModel(features, head)
    card = ModelCard(
        model="mlp",
        case_shape=(1, 28, 28),
        classes=("a", "b", "c"),
        features=features.card(),
    )
    path = tmp_path / "student.safetensors"
    save_model(path, student, card)
    found, found_card = load_featured_model(path)
    assert found_card == card
    x = torch.from_numpy(IMAGES)
    assert torch.equal(found.eval()(x), student.eval()(x))
    if kind != "none":
        with pytest.raises(UserError, match="another architecture"):
            load_model(path)
