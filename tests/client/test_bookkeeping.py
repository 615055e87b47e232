"""Book-keeping gives the sums that clipping example by example gives, or says that it doesn't know."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import client.bookkeeping as bookkeeping
from client.bookkeeping import BookKeeping, NotKnown, require_agreement, squared_norms
from client.private_step import Clipping, OpacusHooks
from common.errors import UserError
from common.fitness import require_cases_apart
from common.losses import balanced_softmax_cross_entropy
from common.models import FOR_TEXTS, REGISTRY, build

LOSS = nn.functional.cross_entropy


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.inner(torch.tanh(self.inner(x))))


class Tied(Twice):
    def __init__(self):
        super().__init__()
        self.outer = nn.Linear(6, 6)
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.head(self.outer(torch.tanh(self.inner(x))))


class Functional(Twice):
    def forward(self, x):
        return self.head(self.inner(x) @ self.inner.weight)


class Reordered(Twice):
    """Its layers see the examples in different orders."""

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.inner(x[order]))[order.argsort()])


class OnItself(nn.Module):
    """Its only layer says the logits, and has a part in what it sees."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x * self.head.weight.sum(dim=0))


def watched() -> nn.Module:
    model = nn.Linear(6, 3)
    model.register_forward_hook(lambda *_: None)
    return model


def sequence(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 6, padding_idx=0), inner, nn.LayerNorm(6), Mean(), nn.Linear(6, 3))


KNOWN = {
    "linear": ((6,), lambda: nn.Linear(6, 3)),
    "head": ((6,), lambda: nn.Sequential(nn.Linear(6, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 3))),
    "no bias": ((6,), lambda: nn.Linear(6, 3, bias=False)),
    "not the logits": ((6,), lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh())),
    "changed in place": ((6,), lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True))),
    "mlp": ((6,), lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 3, bias=False))),
    "few positions": ((3, 6), lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Mean(), nn.Linear(8, 3))),
    "many positions": ((20, 6), lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Mean(), nn.Linear(8, 3))),
    "conv2d": (
        (2, 6, 6),
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, stride=2, padding=1),
            nn.GroupNorm(4, 8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 3, groups=2, padding=2, dilation=2, bias=False),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
    ),
    "conv1d": ((2, 9), lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(28, 3))),
    "text": ((5,), lambda: sequence(nn.Identity())),
    "text, a frozen layer": ((5,), lambda: sequence(nn.Linear(6, 6).requires_grad_(False))),
}
UNKNOWN = {
    "shared": lambda: nn.Sequential(*[nn.Linear(6, 6)] * 2, nn.Linear(6, 3)),
    "called twice": Twice,
    "tied": Tied,
    "parametrised": lambda: weight_norm(nn.Linear(6, 3)),
    "watched by another": watched,
    "subclass": lambda: type("Own", (nn.Linear,), {})(6, 3),
    "unknown class": lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU(), nn.Linear(6, 3)),
}


def examples(model, shape, n, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Embedding):
        x = torch.randint(0, 7, (n, *shape), generator=generator)
    else:
        x = scale * torch.randn(n, *shape, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def naive(model, x, y, clip, loss=LOSS):
    """Example by example, in float64."""
    wide = model.double()
    trained = [parameter for parameter in wide.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter) for parameter in trained]
    for one, label in zip(x if x.dtype == torch.int64 else x.double(), y, strict=True):
        gradient = torch.autograd.grad(loss(wide(one[None]), label[None]), trained)
        norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
        sums = [s + min(1.0, clip / (norm + 1e-6)) * part for s, part in zip(sums, gradient, strict=True)]
    model.float()
    return sums


def distance(found, wanted):
    apart = sum(float((f.detach().double() - w).square().sum()) for f, w in zip(found, wanted, strict=True))
    return math.sqrt(apart / max(1e-12, sum(float(w.square().sum()) for w in wanted)))


@pytest.mark.parametrize("kind", KNOWN)
@settings(deadline=None, max_examples=10)
@given(
    n=st.integers(1, 9), seed=st.integers(0, 99), clip=st.floats(0.05, 5), scale=st.sampled_from([0.3, 3.0])
)
def test_it_gives_the_naive_sums(kind, n, seed, clip, scale):
    shape, make = KNOWN[kind]
    torch.manual_seed(seed)
    model = make()
    x, y = examples(model, shape, n, seed, scale)
    engine = BookKeeping(model, LOSS, clip)
    found = engine(x, y)
    engine.close()
    assert distance(found, naive(model, x, y, clip)) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_it_gives_the_naive_sums_of_any_loss(kind):
    shape, make = KNOWN[kind]
    model = make()
    x, y = examples(model, shape, 9, 0, 3.0)
    log_prior_C = torch.tensor([0.7, 0.2, 0.1]).log()

    def loss(logits_BC, y_B):
        return balanced_softmax_cross_entropy(logits_BC, y_B, log_prior_C.to(logits_BC.dtype))

    engine = BookKeeping(model, loss, 0.5)
    found = engine(x, y)
    engine.close()
    assert distance(found, naive(model, x, y, 0.5, loss)) < 1e-5


@st.composite
def convolutional(draw):
    """Convolutions, some without bias, some frozen, some normalised, and the shape of a case."""
    dimensions = draw(st.sampled_from([1, 2]))
    convolution = {1: nn.Conv1d, 2: nn.Conv2d}[dimensions]
    channels = 2 * draw(st.integers(1, 2))
    shape = (channels, *[draw(st.integers(14, 16)) for _ in range(dimensions)])
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        groups, after = draw(st.sampled_from([1, 2])), 4
        numbers = dict(
            kernel_size=tuple(draw(st.integers(1, 3)) for _ in range(dimensions)),
            stride=draw(st.integers(1, 2)),
            padding=tuple(draw(st.integers(0, 2)) for _ in range(dimensions)),
            dilation=draw(st.integers(1, 2)),
            bias=draw(st.booleans()),
        )
        layers.append(convolution(channels, after, groups=groups, **numbers))
        layers += [nn.GroupNorm(2, after, affine=draw(st.booleans()))] * draw(st.booleans())
        layers.append(draw(st.sampled_from([nn.Tanh(), nn.GELU(), nn.ReLU(inplace=True)])))
        channels = after
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveMaxPool2d}[dimensions]
    model = nn.Sequential(*layers, pool(2), nn.Flatten(), nn.Linear(channels * 2**dimensions, 3))
    for layer in model[:-1]:
        layer.requires_grad_(draw(st.booleans()))
    return model, shape


@st.composite
def sequential(draw):
    """Linear layers at every position of a sequence, and the shape of a case."""
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 2)), draw(st.integers(2, 5)))
    layers: list[nn.Module] = []
    width = shape[-1]
    for _ in range(draw(st.integers(1, 3))):
        after = draw(st.integers(2, 12))
        layers.append(nn.Linear(width, after, bias=draw(st.booleans())))
        layers += [nn.LayerNorm(after, elementwise_affine=draw(st.booleans()))] * draw(st.booleans())
        layers.append(nn.Tanh())
        width = after
    model = nn.Sequential(*layers, Mean(), Mean(), nn.Linear(width, 3))
    for layer in model[:-1]:
        layer.requires_grad_(draw(st.booleans()))
    return model, shape


@pytest.mark.parametrize("networks", [convolutional(), sequential()], ids=["convolutional", "sequential"])
def test_networks_of_any_build_give_the_naive_sums(networks):
    @settings(deadline=None, max_examples=40)
    @given(network=networks, n=st.integers(0, 6), seed=st.integers(0, 99), clip=st.floats(0.01, 5))
    def check(network, n, seed, clip):
        model, shape = network
        x, y = examples(model, shape, n, seed, 1.0)
        engine = BookKeeping(model.double(), LOSS, clip)  # some are too ill-conditioned for float32
        found = engine(x.double(), y)
        engine.close()
        assert distance(found, naive(model, x, y, clip)) < 1e-5

    check()


def without_changes_in_place(model):
    """Opacus's hooks refuse them."""
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return model


@pytest.mark.parametrize("kind", ["mlp", "conv2d", "many positions", "text, a frozen layer"])
def test_opacus_gives_the_same_sums(kind):
    shape, make = KNOWN[kind]
    model = without_changes_in_place(make())
    x, y = examples(model, shape, 8, 1, 1.0)
    x = x.clamp(min=1) if x.dtype == torch.int64 else x  # Opacus gives the padding a gradient
    engine = BookKeeping(model, LOSS, 0.3)
    found = engine(x, y)
    engine.close()
    assert distance(found, [part.double() for part in OpacusHooks(model, LOSS, 0.3)(x, y)]) < 1e-5


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_it_does_not_know_goes_to_opacus(kind):
    model = UNKNOWN[kind]()
    x, y = examples(model, (6,), 5, 0, 1.0)
    with pytest.raises(NotKnown):
        BookKeeping(model, LOSS, 0.3)(x, y)
    model = UNKNOWN[kind]()
    clipping = Clipping(model, LOSS, 0.3, (6,))
    found = clipping(x, y)
    clipping.close()
    assert isinstance(clipping._engine, OpacusHooks)
    assert distance(found, naive(model, x, y, 0.3)) < 1e-5


@pytest.mark.parametrize("name", REGISTRY)
def test_every_architecture_of_the_registry_is_known(name):
    shape = (1, 20) if name in FOR_TEXTS else (1, 12, 12)
    model = build(name, shape, 3, seed=1)
    x, y = examples(model, shape, 5, 0, 1.0)
    if name in FOR_TEXTS:
        x = x.abs().mul(3).round()  # ids, among them padding and some that are there twice
    clipping = Clipping(model, LOSS, 0.3, shape)
    found = clipping(x, y)
    clipping.close()
    assert isinstance(clipping._engine, BookKeeping)
    assert distance(found, naive(model, x, y, 0.3)) < 1e-5


@pytest.mark.parametrize("kind", [Functional, OnItself])
def test_a_layer_whose_weight_is_used_elsewhere_is_known_to_neither_and_refused_at_enrolment(kind):
    model = kind()
    with pytest.raises(UserError, match="not those of each case alone"):
        require_cases_apart(model, (6,))
    with pytest.raises(NotKnown, match="exactly once"):
        BookKeeping(model, LOSS, 0.3)(*examples(model, (6,), 5, 0, 1.0))


def test_a_model_whose_sums_are_wrong_is_found_out_by_the_trial_once():
    model = Reordered()
    x, y = examples(model, (6,), 5, 0, 1.0)
    engine = BookKeeping(model, LOSS, 0.3)
    found = engine(x, y)
    engine.close()
    assert distance(found, naive(model, x, y, 0.3)) > 1e-3  # no check of a pass shows it
    before = [parameter.clone() for parameter in model.parameters()]
    for _ in range(2):
        with pytest.raises(NotKnown, match="from those case by case"):
            require_agreement(model, (6,))
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["linear", "mlp", "few positions", "many positions", "conv2d"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_example_touches_no_other_and_no_later_pass(kind, broken):
    shape, make = KNOWN[kind]
    model = make()
    x, y = examples(model, shape, 6, 2, 1.0)
    rest = torch.arange(6) != 2
    engine = BookKeeping(model, LOSS, 0.3)
    whole, without = engine(x, y), engine(x[rest], y[rest])
    poisoned = x.clone()
    poisoned[2] = broken
    assert all(torch.equal(one, other) for one, other in zip(engine(poisoned, y), without, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(engine(x, y), whole, strict=True))
    poisoned[:] = broken
    assert all(not part.any() for part in engine(poisoned, y))


@pytest.mark.parametrize("kind", KNOWN)
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 999),
    exponent=st.integers(-30, 37),
    clip=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0, 1e6]),
)
def test_one_example_adds_at_most_the_clipping_norm(kind, seed, exponent, clip):
    shape, make = KNOWN[kind]
    torch.manual_seed(seed)
    model = make()
    engine = BookKeeping(model, LOSS, clip)
    found = engine(*examples(model, shape, 1, seed, 10.0**exponent))
    norm = math.sqrt(sum(float(part.detach().double().square().sum()) for part in found))
    assert norm <= clip  # also where it is no number


@settings(deadline=None, max_examples=100)
@given(
    width=st.integers(1, 300), seed=st.integers(0, 999), exponent=st.integers(-15, 18), equal=st.booleans()
)
def test_a_norm_is_never_below_the_truth_nor_far_above(width, seed, exponent, equal):
    drawn = torch.ones(3, width) if equal else torch.randn(3, width, generator=torch.manual_seed(seed))
    gradient = drawn * 10.0**exponent
    true = [math.fsum(float(one) ** 2 for one in row) for row in gradient]
    found = squared_norms(gradient).tolist()
    assert all(t <= f <= t * (1 + 1e-5) for t, f in zip(true, found, strict=True))


@pytest.mark.parametrize("limit", ["KEPT_NUMBERS", "SEEN_NUMBERS"])
@pytest.mark.parametrize("kind", ["many positions", "conv2d", "text"])
def test_a_batch_in_pieces_gives_the_same_sums(kind, limit, monkeypatch):
    shape, make = KNOWN[kind]
    model = make()
    x, y = examples(model, shape, 9, 3, 1.0)
    engine = BookKeeping(model, LOSS, 0.3)
    whole = [part.double() for part in engine(x, y)]
    engine.close()
    monkeypatch.setattr(bookkeeping, limit, 100)
    in_pieces = BookKeeping(model, LOSS, 0.3)
    assert distance(in_pieces(x, y), whole) < 1e-6
    assert in_pieces.at_once < 9 <= engine.at_once
