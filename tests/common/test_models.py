"""Architectures, building by name and by path, private fitness, and files."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError, UserError
from common.models import (
    FOR_TEXTS,
    REGISTRY,
    Classifier,
    FeatureCard,
    ModelCard,
    ModelFileError,
    ResidualBlock,
    build,
    cut,
    has_trunk,
    head_of,
    load_by_path,
    load_model,
    load_weights,
    model_bytes,
    private_ready,
    read_card,
    save_model,
    trunk_of,
)

IMAGE, TEXT = (1, 28, 28), (1, 12)
WITH_ANY_NUMBERS = [name for name in REGISTRY if name not in FOR_TEXTS]
CARD = ModelCard(model="mlp", case_shape=(5,), classes=("healthy", "ill"))


@pytest.mark.parametrize(
    ("name", "parameters"), [("linear", 7_850), ("mlp", 109_386), ("cnn", 26_554), ("resnet-gn", 77_562)]
)
def test_sizes(name, parameters):
    model = build(name, IMAGE, 10, seed=0)
    assert sum(weights.numel() for weights in model.parameters()) == parameters
    assert model(torch.rand(3, *IMAGE)).shape == (3, 10)


def test_a_text_is_the_mean_of_its_pieces_wherever_the_padding_ends():
    model = build("text", (1, 9), 3, seed=0)
    once, twice = [5, 7, 5, 8191], [5, 7, 5, 8191] * 2
    long = torch.tensor([[[*once, 0, 0, 0, 0, 0]], [[0] * 9], [[*twice, 0]]]).float()
    said = model(long)
    assert said.shape == (3, 3)
    assert torch.allclose(said[0], model(long[:1, :, :4])[0]) and torch.allclose(said[0], said[2], atol=1e-6)
    vectors = model.trunk[0].embedding.weight
    assert torch.allclose(model.trunk[0](long)[0], (2 * vectors[5] + vectors[7] + vectors[8191]) / 4)
    assert torch.equal(model.trunk[0](long)[1], torch.zeros(vectors.shape[1]))


@pytest.mark.parametrize("name", WITH_ANY_NUMBERS)
@pytest.mark.parametrize("case_shape", [(1, 8, 8), (3, 32, 20)])
def test_every_image_model_takes_any_image(name, case_shape):
    assert build(name, case_shape, 4, seed=0)(torch.rand(2, *case_shape)).shape == (2, 4)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_tables(name):
    assert build(name, (13,), 2, seed=0)(torch.rand(2, 13)).shape == (2, 2)


@pytest.mark.parametrize("name", WITH_ANY_NUMBERS)
def test_building_is_a_function_of_its_arguments(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (build(name, IMAGE, 10, seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    if name != "linear":
        assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", REGISTRY)
def test_trunk_and_head_make_the_model(name):
    shape = TEXT if name in FOR_TEXTS else IMAGE
    model = build(name, shape, 10, seed=0)
    x = torch.rand(3, *shape).round()
    features_ND = trunk_of(model)(x)
    assert features_ND.shape == (3, head_of(model).in_features)
    assert torch.equal(head_of(model)(features_ND), model(x))
    assert not any(isinstance(layer, _BatchNorm) for layer in model.modules())


def test_a_sequential_splits_before_its_last_layer():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.rand(5, 4)
    assert torch.equal(head_of(model)(trunk_of(model)(x)), model(x))


def test_what_has_no_head_says_what_it_needs():
    with pytest.raises(UserError, match=r"Bilinear has no trunk and head: give it an attribute `trunk`"):
        head_of(nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize(
    ("name", "case_shape", "complaint"),
    [
        ("cnnn", IMAGE, r"one of linear, mlp, cnn, resnet-gn, text, or module:Class; did you mean 'cnn'\?"),
        ("transformer", IMAGE, "one of linear, mlp, cnn, resnet-gn, text, or module:Class$"),
        ("text", (13,), r"linear or mlp for cases of shape \(13,\): 'text' takes texts as they are"),
        ("text", IMAGE, r"linear or mlp for cases of shape \(1, 28, 28\): 'text' takes texts as they are"),
        ("linear", TEXT, "text, or features = words: cases are texts, and 'linear' takes numbers"),
        ("cnn", TEXT, "text, or features = words: cases are texts, and 'cnn' takes numbers"),
        ("cnn", (13,), r"linear or mlp for cases of shape \(13,\): 'cnn' takes images"),
        ("resnet-gn", (1, 6, 28), "'resnet-gn' takes images of 8 pixels a side or more"),
        ("os:getcwd", IMAGE, "an import path from this party's own allow-list"),
    ],
)
def test_refused_names(name, case_shape, complaint):
    with pytest.raises(ConfigError, match=complaint):
        build(name, case_shape, 2, seed=0)


USERS_MODULE = """
import torch
from torch import nn

class Good(nn.Module):
    def __init__(self, case_shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(case_shape[0], num_classes)
    def forward(self, x):
        return self.layer(x)

class Narrow(Good):
    def forward(self, x):
        return super().forward(x)[:, :1]

class Infinite(Good):
    def forward(self, x):
        return super().forward(x) / 0

class Tuple(Good):
    def forward(self, x):
        return (super().forward(x),)

class Shy(Good):
    def __init__(self):
        super().__init__((2,), 2)

def dictionary(case_shape, num_classes):
    return {}

def Leaving(case_shape, num_classes):
    raise SystemExit(0)

class OfPixels(Good):
    def forward(self, x):
        return super().forward(x.sqrt())
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "ward_models.py").write_text(USERS_MODULE)
    (tmp_path / "broken_models.py").write_text("1 / 0")
    (tmp_path / "script_models.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    yield "ward_models"
    sys.modules.pop("ward_models", None)


def test_a_users_own_model(users_module):
    path = f"{users_module}:Good"
    first, second = (build(path, (4,), 3, seed=1, allowed_paths=[path]) for _ in range(2))
    assert first(torch.rand(2, 4)).shape == (2, 3)
    assert torch.equal(first.layer.weight, second.layer.weight)
    assert first.training


def test_a_model_may_count_on_cases_that_lie_between_zero_and_one(users_module):
    load_by_path(f"{users_module}:OfPixels", (4,), 3)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("ward_models:Nobody", "module:Class that can be imported .*Nobody"),
        ("no_such_module:Net", "No module named 'no_such_module'"),
        ("broken_models:Net", "ZeroDivisionError"),
        ("script_models:Net", r"module:Class that can be imported \(SystemExit"),
        ("ward_models:Leaving", r"a class that takes .*\(SystemExit"),
        ("ward_models:", "module:Class that can be imported"),
        ("ward_models:Shy", r"a class that takes \(case_shape, num_classes\) = \(\(4,\), 3\)"),
        ("ward_models:dictionary", "a torch.nn.Module, not a dict"),
        ("ward_models:Narrow", r"finite logits of shape \(4, 3\), not \(4, 1\)"),
        ("ward_models:Infinite", "finite"),
        ("ward_models:Tuple", "not a tuple"),
    ],
)
def test_a_users_model_that_does_not_fit(users_module, path, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_by_path(path, (4,), 3)


class OwnNorm(nn.BatchNorm1d):
    """A subclass, which Opacus's validator does not see."""


@pytest.mark.parametrize(
    ("norm", "weights"),
    [(nn.BatchNorm1d(6), 2), (nn.BatchNorm1d(6, affine=False), 0), (OwnNorm(6), 2)],
)
def test_batch_normalisation_is_replaced(norm, weights):
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(norm), nn.Linear(6, 2)).eval()
    fit = private_ready(model, (4,))
    assert isinstance(fit[1][0], nn.GroupNorm)
    assert len(list(fit[1][0].parameters())) == weights
    assert fit.training
    assert model[1][0] is norm  # the model itself is left as it was


def test_layers_that_change_their_input_in_place_may_stay():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    fit = private_ready(model, (4,))
    x = torch.randn(3, 4)
    assert torch.equal(fit(x), model(x))
    assert not fit[1].inplace and model[1].inplace


def test_what_remembers_its_batches_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True))
    with pytest.raises(UserError, match=r"layer 1 \(InstanceNorm2d\) can't be trained in private"):
        private_ready(model, (1, 8, 8))

    class Remembering(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("mean", torch.zeros(2))

    with pytest.raises(UserError, match=r"layer itself \(Remembering\).*keeps numbers beside its weights"):
        private_ready(Remembering(), (2,))


class Changing(nn.Module):
    """Changes what it is given: the second pass over the same cases sees others than were there."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(2, 2), change

    def forward(self, x):
        self.change(x)
        return self.layer(x)


@pytest.mark.parametrize("change", [lambda x: x.clamp_(min=0), lambda x: x.data.clamp_(min=0)])
def test_a_model_that_changes_its_cases_in_place_is_refused(change):
    with pytest.raises(
        UserError, match="Changing can't be trained in private: it changes its cases in place"
    ):
        private_ready(Changing(change), (2,))


@pytest.mark.parametrize("name", REGISTRY)
def test_opacus_takes_every_model_and_its_gradients_are_one_cases(name):
    shape = TEXT if name in FOR_TEXTS else IMAGE
    model = private_ready(build(name, shape, 4, seed=0), shape)
    # Cases drawn anew each time would now and then leave a ReLU at zero, on either side of it by rounding.
    drawn = torch.Generator().manual_seed(0)
    x = (
        torch.randint(9, (3, *shape), generator=drawn)
        if name in FOR_TEXTS
        else torch.rand(3, *shape, generator=drawn)
    )
    x, y = x.float(), torch.tensor([0, 1, 3])
    watched = GradSampleModule(model, loss_reduction="mean")
    nn.functional.cross_entropy(watched(x), y).backward()
    found = {key: weights.grad_sample for key, weights in model.named_parameters()}
    watched.remove_hooks()
    for case in range(3):
        alone = private_ready(build(name, shape, 4, seed=0), shape)
        nn.functional.cross_entropy(alone(x[case : case + 1]), y[case : case + 1]).backward()
        for key, weights in alone.named_parameters():
            assert torch.allclose(found[key][case], weights.grad, atol=1e-5), key


def test_a_model_comes_back_from_disk(tmp_path):
    model = build("mlp", (5,), 2, seed=3)
    save_model(tmp_path / "model.safetensors", model, CARD)
    found, card = load_model(tmp_path / "model.safetensors")
    x = torch.rand(4, 5)
    assert card == CARD
    assert torch.equal(found(x), model(x))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == model_bytes(model, CARD)


def test_tied_weights_are_no_obstacle():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load_weights(model_bytes(model, CARD), other)
    assert torch.equal(other[1].weight, model[0].weight)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (
            lambda: build("mlp", (6,), 2, seed=0),
            r"trunk\.1\.weight has shape \(128, 5\), the model's has \(128, 6\)",
        ),
        (lambda: build("linear", (5,), 2, seed=0), r"another architecture's"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, other, complaint):
    path = tmp_path / "model.safetensors"
    save_model(path, build("mlp", (5,), 2, seed=3), CARD)
    model = other()
    before = {key: weights.clone() for key, weights in model.state_dict().items()}
    with pytest.raises(ModelFileError, match=complaint):
        load_model(path, into=model)
    assert all(torch.equal(before[key], weights) for key, weights in model.state_dict().items())


def test_weights_must_be_finite(tmp_path):
    model = build("mlp", (5,), 2, seed=3)
    model.head.bias.data[0] = np.inf
    with pytest.raises(ModelFileError, match=r"head\.bias is not finite"):
        load_weights(model_bytes(model, CARD), model)


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelFileError):
        read_card(path)
    with pytest.raises(ModelFileError):
        load_weights(data, nn.Linear(1, 1))


def test_a_file_cannot_choose_code(tmp_path, users_module):
    card = ModelCard(model=f"{users_module}:Good", case_shape=(4,), classes=("a", "b", "c"))
    model = load_by_path(card.model, (4,), 3)
    save_model(tmp_path / "model.safetensors", model, card)
    with pytest.raises(ConfigError, match="allow-list"):
        load_model(tmp_path / "model.safetensors")
    load_model(tmp_path / "model.safetensors", into=load_by_path(card.model, (4,), 3))


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="can't be written"):
        save_model(tmp_path / "nowhere" / "model.safetensors", build("linear", (5,), 2, seed=0), CARD)


def test_cards_keep_what_features_need():
    card = CARD.model_copy(update={"features": FeatureCard(kind="pca", raw_width=5, columns=3)})
    assert ModelCard.model_validate_json(card.model_dump_json()) == card


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet-gn"])
def test_a_cut_model_is_the_model(name):
    model, x = build(name, (1, 12, 12), 3, seed=0).eval(), torch.rand(5, 1, 12, 12)
    sizes = []
    for layers in ("head", "last-block", "all"):
        lower, learned = cut(model, layers)
        assert torch.allclose(learned(lower(x)), model(x), atol=1e-6)
        sizes.append(sum(weights.numel() for weights in learned.parameters()))
    whole = sum(weights.numel() for weights in model.parameters())
    assert sizes[0] == sum(weights.numel() for weights in head_of(model).parameters())
    assert sizes[0] < sizes[1] < sizes[2] == whole


def test_a_trunk_is_one_that_learns_and_its_last_block_needs_parts_in_a_row():
    assert has_trunk(build("mlp", (4,), 3, seed=0))
    assert not has_trunk(build("linear", (4,), 3, seed=0)) and not has_trunk(nn.Linear(4, 3))
    with pytest.raises(UserError, match="no last block"):
        cut(Classifier(ResidualBlock(8, 8, stride=1), 8, 3), "last-block")
