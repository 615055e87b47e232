"""Distillation: a linear model is fitted exactly, others come close, and nothing is random but by a seed."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import nn

from common.architectures import MIXED, Architecture, mixed_architecture
from common.config import Distillation, Layers
from common.distillation import (
    Learner,
    affine_layer,
    build_learner,
    fit_labels,
    fit_soft_labels,
    outline_learner,
)
from common.errors import ConfigError, UserError
from common.losses import distillation_loss, log_soft_labels
from common.preprocessing import NumericSpec, Preprocessing, Text
from common.proxy import Proxy
from common.records import Records

FEATURES = ("a", "b", "c", "d")


def proxy(cases: int = 60, labelled: bool = True, seed: int = 0) -> Proxy:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(cases, len(FEATURES)))
    target = np.where(values[:, 0] + 0.3 * rng.normal(size=cases) > 0, "yes", "no")
    records = Records(dict(zip(FEATURES, values.T, strict=True)), target, None, {})
    preprocessing = Preprocessing.fit(records, [NumericSpec(name=name) for name in FEATURES], ("no", "yes"))
    encoded = preprocessing.encode(records)
    return Proxy(preprocessing, encoded.x, encoded.y if labelled else np.full(cases, -1))


def learner(model: str, layers: Layers = "all", seed: int = 0) -> Learner:
    return build_learner(Architecture(model, "none", 3, layers), proxy(), seed, ())


def said(one: Learner, public: Proxy) -> np.ndarray:
    return one.logits(one.phi(public.x))


def logits_of(cases: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(cases, 2)).astype(np.float32)


def test_hard_labels_give_a_linear_model_its_regularised_optimum():
    public, settings = proxy(), Distillation(weight_decay=0.05)
    one = learner("linear")
    fit_labels(one, one.phi(public.x), public.y, settings, 0)
    # Two classes with one weight vector each, both penalised: half the penalty on their difference.
    reference = LogisticRegression(C=1 / (len(public.y) * 0.05 / 2), tol=1e-8, max_iter=10_000)
    reference.fit(public.x, public.y)
    ours = said(one, public)
    np.testing.assert_allclose(ours[:, 1] - ours[:, 0], reference.decision_function(public.x), atol=2e-3)


def test_logits_that_a_linear_model_can_have_are_taken_over_exactly():
    public, settings = proxy(), Distillation(temperature=3.0)
    rng = np.random.default_rng(5)
    wanted = (public.x @ rng.normal(size=(4, 2)) + rng.normal(size=2)).astype(np.float32)
    one = learner("linear")
    fit_soft_labels(one, one.phi(public.x), log_soft_labels(wanted, 3.0), public.y, settings, 0)
    found = said(one, public)
    centred = wanted - wanted.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found - found.mean(axis=1, keepdims=True), centred, atol=0.02)


def test_other_logits_are_taken_over_in_the_sense_of_least_squares():
    public, z = proxy(), logits_of(60)
    one = learner("linear")
    fit_soft_labels(one, one.phi(public.x), log_soft_labels(z, 2.0), public.y, Distillation(), 0)
    target = z - z.mean(axis=1, keepdims=True)

    def misfit(weights: np.ndarray) -> float:
        found = public.x @ weights[:8].reshape(4, 2) + weights[8:]
        return float(((found - target) ** 2).mean())

    best = minimize(misfit, np.zeros(10)).fun
    found = said(one, public)
    assert ((found - target) ** 2).mean() == pytest.approx(best, rel=1e-3)


def test_a_linear_model_forgets_where_it_started():
    public, z = proxy(), log_soft_labels(logits_of(60), 2.0)
    one, other = learner("linear"), learner("linear")
    fit_soft_labels(
        one, one.phi(public.x), log_soft_labels(logits_of(60, 9), 2.0), public.y, Distillation(), 0
    )
    for each in (one, other):
        fit_soft_labels(each, each.phi(public.x), z, public.y, Distillation(), 0)
    assert (said(one, public) == said(other, public)).all()


@pytest.mark.parametrize(("model", "alpha"), [("mlp", 1.0), ("mlp", 0.5), ("linear", 0.5)])
def test_whatever_is_not_linear_comes_close_by_descent(model, alpha):
    public, settings = proxy(), Distillation(alpha=alpha, epochs=150, weight_decay=0.0)
    teacher = np.stack([np.zeros(60), 2 * public.x[:, 0]], axis=1).astype(np.float32)
    one, soft = learner(model), log_soft_labels(teacher, 2.0)

    def loss() -> float:
        arguments = map(torch.tensor, (said(one, public), soft, public.y))
        return float(distillation_loss(*arguments, temperature=2.0, alpha=alpha))

    before = loss()
    fit_soft_labels(one, one.phi(public.x), soft, public.y, settings, 0)
    assert loss() < 0.7 * before


def test_a_fit_that_diverges_says_what_would_help():
    public, one = proxy(), learner("mlp")
    with pytest.raises(UserError, match="lower learning-rate = 10000"):
        fit_labels(one, one.phi(public.x), public.y, Distillation(learning_rate=1e4), 0)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_the_same_seed_gives_the_same_bits_whatever_torch_drew_before(model):
    public, z = proxy(), log_soft_labels(logits_of(60), 2.0)
    found = []
    for disturbance in (0, 1):
        torch.manual_seed(disturbance)
        one = learner(model, seed=7)
        fit_labels(one, one.phi(public.x), public.y, Distillation(epochs=2), 3)
        fit_soft_labels(one, one.phi(public.x), z, public.y, Distillation(epochs=2), 3)
        found.append(one.state())
    assert found[0] == found[1]


def test_a_parameter_may_be_a_slice_of_a_tensor_which_is_left_alone_beside_it():
    public, one, sliced = proxy(), learner("mlp"), learner("mlp")
    layer = next(layer for layer in sliced.model.modules() if isinstance(layer, nn.Linear))
    width = layer.in_features
    whole = torch.cat([layer.weight.detach(), torch.full_like(layer.weight, 7.0)], dim=1)
    layer.weight = nn.Parameter(whole[:, :width])
    for each in (one, sliced):
        fit_labels(each, each.phi(public.x), public.y, Distillation(epochs=20), 0)
    assert (whole[:, width:] == 7.0).all() and (whole[:, :width] == layer.weight).all()
    assert np.allclose(said(one, public), said(sliced, public), atol=1e-4)


def test_a_state_comes_back_and_one_of_another_model_does_not():
    one, other = learner("mlp", seed=0), learner("mlp", seed=1)
    assert one.state() != other.state()
    other.restore(one.state())
    assert other.state() == one.state()
    with pytest.raises(RuntimeError):
        learner("linear").restore(one.state())


def test_which_models_are_linear():
    assert affine_layer(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) is not None
    assert affine_layer(learner("linear").model) is not None
    assert affine_layer(learner("mlp").model) is None
    assert affine_layer(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))) is None
    assert affine_layer(nn.Sequential(nn.Linear(4, 2), nn.ReLU())) is None


def test_every_mixed_architecture_of_a_table_can_be_built_and_they_differ():
    public = proxy()
    shown = [mixed_architecture(public.preprocessing.case_shape, place) for place in range(5)]
    assert len(set(shown[:3])) == 3 and shown[3] == shown[0]
    assert set(shown) == set(MIXED["table"])
    for place, architecture in enumerate(shown):
        one = build_learner(architecture, public, place, ())
        assert said(one, public).shape == (60, 2)


def texts() -> Proxy:
    words = np.random.default_rng(0).choice(["pain", "none", "severe", "rest", "cough", "fever"], (70, 5))
    notes = np.array([" ".join(some) for some in words], dtype=object)
    records = Records({"note": notes}, np.full(70, "no"), None, {})
    preprocessing = Preprocessing.fit(records, [Text(name="note", length=40)], ("no", "yes"))
    cases = preprocessing.encode(records)
    return Proxy(preprocessing, cases.x, cases.y)


def test_every_mixed_architecture_of_texts_can_be_built():
    public = texts()
    for place, architecture in enumerate(MIXED["text"]):
        assert mixed_architecture(public.preprocessing.case_shape, place) == architecture
        one = build_learner(architecture, public, place, ())
        assert said(one, public).shape == (70, 2)


@pytest.mark.parametrize(
    ("layers", "learned", "shape"),
    [("head", 42, (20,)), ("last-block", 4_290, (64,)), ("all", 528_706, (1, 40))],
)
def test_layers_of_a_text_student(layers, learned, shape):
    public = texts()
    one = build_learner(Architecture("text", "none", 20, layers), public, 0, ())
    assert one.features.shape == shape
    assert sum(weights.numel() for weights in one.model.parameters()) == learned
    assert said(one, public).shape == (70, 2)


@pytest.mark.parametrize(
    ("layers", "learned", "shape"), [("head", 42, (20,)), ("last-block", 8_386, (128,)), ("all", 9_026, (4,))]
)
def test_what_does_not_learn_is_a_public_trunk_that_belongs_to_the_features(layers, learned, shape):
    public = proxy()
    one, again = (build_learner(Architecture("mlp", "none", 20, layers), public, seed, ()) for seed in (0, 1))
    assert one.features.shape == shape and one.features.name == again.features.name
    assert sum(weights.numel() for weights in one.model.parameters()) == learned
    assert not any(weights.requires_grad for weights in one.features.parameters())
    assert torch.equal(one.phi(public.x), again.phi(public.x))
    assert said(one, public).shape == (60, 2)
    outline = outline_learner(Architecture("mlp", "none", 20, layers), public, ())
    assert [w.shape for w in outline.model.parameters()] == [w.shape for w in one.model.parameters()]


class Brought(nn.Module):
    """A user's model whose trunk has learned elsewhere."""

    def __init__(self, case_shape, num_classes, between=None):
        super().__init__()
        layer = nn.Linear(case_shape[0], 6)
        nn.init.constant_(layer.weight, 0.5)
        self.trunk = nn.Sequential(layer, nn.Tanh(), *([between] if between else []))
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.head(self.trunk(x))


class Centring(nn.Module):
    """Subtracts the mean of the batch at hand."""

    def forward(self, x):
        return x - x.mean(dim=0)


class Mixing(Brought):
    """Its trunk mixes cases."""

    def __init__(self, case_shape, num_classes):
        super().__init__(case_shape, num_classes, Centring())


def test_a_model_of_ones_own_brings_its_trunk_along():
    path = f"{__name__}:Brought"
    one = build_learner(Architecture(path, "none", 6, "head"), proxy(), 0, (path,))
    assert (one.features.raw[1][0].weight == 0.5).all()
    assert affine_layer(one.model) is not None


def test_nothing_is_learned_above_a_trunk_that_mixes_cases():
    path = f"{__name__}:Mixing"
    with pytest.raises(UserError, match="depends on the others in the batch"):
        build_learner(Architecture(path, "none", 6, "head"), proxy(), 0, (path,))


def test_code_by_import_path_needs_the_partys_own_leave():
    with pytest.raises(ConfigError, match="allow-list"):
        build_learner(Architecture("torch.nn:Linear"), proxy(), 0, ())
