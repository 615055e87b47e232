"""The private step is the mechanism on paper: clip each example, sum, add noise, divide by declared size."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client import bookkeeping, private_step
from client.bookkeeping import KEPT_NUMBERS
from client.noise import PrivateRandomness
from client.private_step import MICRO_BATCH, SiteOptimizer, StepSettings, Units, numbers_held, private_steps

LOSS = nn.functional.cross_entropy


def network(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "linear": lambda: nn.Linear(5, 3),
            "mlp": lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)),
        }[kind]()


def examples(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, 5)).astype(np.float32)), torch.from_numpy(
        rng.integers(0, 3, n)
    )


def naive_step(model: nn.Module, phi, y, step: StepSettings) -> list[torch.Tensor]:
    """One step without noise, example by example."""
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for x_1, y_1 in zip(phi, y, strict=True):
        model.zero_grad()
        LOSS(model(x_1[None]), y_1[None]).backward()
        gradient = [parameter.grad.clone() for parameter in model.parameters()]
        norm = torch.sqrt(sum(part.square().sum() for part in gradient))
        if torch.isfinite(norm):
            factor = min(1.0, step.clipping_norm / (float(norm) + 1e-6))
            total = [one + factor * part for one, part in zip(total, gradient, strict=True)]
    return [
        parameter.detach() - step.step_size * one / (step.sample_rate * step.declared_size)
        for parameter, one in zip(model.parameters(), total, strict=True)
    ]


def silent(**changes) -> StepSettings:
    numbers = dict(noise_multiplier=0.0, clipping_norm=0.3, sample_rate=1.0, declared_size=50, step_size=2.0)
    return StepSettings(**(numbers | changes))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@settings(deadline=None, max_examples=15)
@given(n=st.integers(0, 40), declared=st.integers(1, 1000), clip=st.floats(0.01, 10))
def test_a_step_without_noise_equals_the_naive_one(kind, n, declared, clip):
    step = silent(declared_size=declared, clipping_norm=clip)
    phi, y = examples(n)
    model = network(kind)
    expected = naive_step(network(kind), phi, y, step)
    private_steps(model, Units.group(phi, y, None), 1, step, LOSS, PrivateRandomness())
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_steps_follow_one_another_and_nothing_is_left_of_a_sum(kind, momentum):
    step = silent(momentum=momentum)
    phi, y = examples(20)
    model, wanted, velocity = network(kind), network(kind), None
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in wanted.parameters()]
        moved = [new - old for new, old in zip(naive_step(wanted, phi, y, step), before, strict=True)]
        velocity = (
            moved if velocity is None else [momentum * v + m for v, m in zip(velocity, moved, strict=True)]
        )
        with torch.no_grad():
            for parameter, old, v in zip(wanted.parameters(), before, velocity, strict=True):
                parameter.copy_(old + v)
    private_steps(model, Units.group(phi, y, None), 3, step, LOSS, PrivateRandomness())
    for one, other in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert one.grad is None
        assert getattr(one, "summed_grad", None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_is_made_of_the_noised_sum_alone_whatever_the_sums_precision_was(dtype):
    # A large batch is added up in float64: were its mean rounded another way, the batch's size would show.
    step = silent(noise_multiplier=17.0, clipping_norm=0.5, sample_rate=0.3, declared_size=3413)
    model = nn.Linear(5, 1000)
    optimizer = SiteOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), step, PrivateRandomness(bytes(range(32)))
    )
    for parameter in model.parameters():
        parameter.summed_grad = torch.zeros(parameter.shape, dtype=dtype)
    optimizer.add_noise()
    numbers = sum(parameter.numel() for parameter in model.parameters())
    noised = PrivateRandomness(bytes(range(32))).noised(np.zeros(numbers, np.float32), 8.5)
    wanted = torch.from_numpy(noised) / torch.tensor(0.3 * 3413, dtype=torch.float64)
    found = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    assert torch.equal(found, wanted)


def test_parameters_of_two_precisions_get_means_of_their_own_from_one_noised_sum():
    step = silent(noise_multiplier=1.0, clipping_norm=1.0, sample_rate=1.0, declared_size=3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2).double())
    optimizer = SiteOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), step, PrivateRandomness(bytes(range(32)))
    )
    for parameter in model.parameters():
        parameter.summed_grad = torch.zeros_like(parameter)
    optimizer.add_noise()
    noised = PrivateRandomness(bytes(range(32))).noised(np.zeros(34), 1.0)
    found = [parameter.grad for parameter in model.parameters()]
    assert [one.dtype for one in found] == [torch.float32] * 2 + [torch.float64] * 2
    wanted = torch.from_numpy(noised / 3).split([20, 4, 8, 2])
    assert all(torch.equal(f.reshape(-1), w.to(f.dtype)) for f, w in zip(found, wanted, strict=True))


class Shrinking(nn.Module):
    """Changes what it is given, in a way that no version counter sees, and only where it sees many cases."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        if len(x) > 8:
            x.data.clamp_(-0.1, 0.1)
        return self.layer(x)


def test_records_are_as_they_were_after_a_model_that_changes_its_cases():
    phi, y = examples(30)
    units = Units.group(phi.clone(), y, None)
    private_steps(Shrinking(), units, 2, silent(), LOSS, PrivateRandomness())
    assert torch.equal(units.phi_ND, phi)


@pytest.mark.parametrize("between", [nn.ReLU, nn.PReLU])  # book-keeping doesn't know the second
def test_batches_larger_than_memory_allows_give_the_same_step(monkeypatch, between):
    def model() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(5, 7), between(), nn.Linear(7, 3))

    phi, y = examples(50)
    whole, pieces = model(), model()
    private_steps(whole, Units.group(phi, y, None), 2, silent(), LOSS, PrivateRandomness())
    monkeypatch.setattr(private_step, "MICRO_BATCH", 7)
    monkeypatch.setattr(bookkeeping, "SEEN_NUMBERS", 22 * 7)  # 22 go into layers and come out of them
    private_steps(pieces, Units.group(phi, y, None), 2, silent(), LOSS, PrivateRandomness())
    for one, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_record_with_a_gradient_that_is_not_finite_counts_as_absent(kind, broken):
    phi, y = examples(20)
    poisoned = phi.clone()
    poisoned[7] = broken
    with_it, without_it = network(kind), network(kind)
    private_steps(with_it, Units.group(poisoned, y, None), 3, silent(), LOSS, PrivateRandomness())
    others = torch.arange(20) != 7
    private_steps(
        without_it, Units.group(phi[others], y[others], None), 3, silent(), LOSS, PrivateRandomness()
    )
    for one, other in zip(with_it.parameters(), without_it.parameters(), strict=True):
        assert torch.isfinite(one).all()
        if broken != 3e38:  # a huge finite record may have a finite gradient, which is clipped like any other
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_noise_has_the_scale_that_the_accountant_was_told():
    step = silent(noise_multiplier=3.0, clipping_norm=0.5, declared_size=10, step_size=1.0)
    phi, y = examples(0)
    model = nn.Linear(5, 4000)
    before = model.weight.detach().clone()
    private_steps(model, Units.group(phi, y, None), 1, step, LOSS, PrivateRandomness())
    moved = (model.weight.detach() - before) * 10
    assert moved.std().item() == pytest.approx(3.0 * 0.5, rel=0.03)
    assert moved.mean().item() == pytest.approx(0.0, abs=0.05)


def test_poisson_sampling_takes_units_at_the_stated_rate_and_one_record_of_each():
    phi, y = examples(3000)
    patients = np.arange(3000) // 3  # a thousand patients, three records each
    units = Units.group(phi, y, patients)
    randomness = PrivateRandomness()
    sizes = []
    for _ in range(200):
        taken = units.sample(randomness, 0.1)
        assert len(np.unique(patients[taken])) == len(taken)
        sizes.append(len(taken))
    assert np.mean(sizes) == pytest.approx(100, rel=0.05)
    full = np.concatenate([units.sample(randomness, 1.0) for _ in range(30)])
    assert len(full) == 30_000
    assert set(full % 3) == {0, 1, 2}


def test_only_a_full_batch_of_patients_with_one_record_each_is_taken_whole():
    phi, y = examples(3000)
    patients, randomness = np.arange(3000) // 3, PrivateRandomness()
    everybody, _ = Units.group(phi, y, None).batch(randomness, 1.0)
    assert torch.equal(everybody, phi)
    sizes = [len(Units.group(phi, y, None).batch(randomness, 0.1)[1]) for _ in range(50)]
    assert np.mean(sizes) == pytest.approx(300, rel=0.1)
    one_each, _ = Units.group(phi, y, patients).batch(randomness, 1.0)
    rows = [int((phi == row).all(dim=1).nonzero()[0, 0]) for row in one_each]
    assert sorted(patients[rows]) == list(range(1000))


def test_adding_a_unit_moves_the_sum_by_at_most_the_clipping_norm():
    step = silent(clipping_norm=0.2, declared_size=1, step_size=1.0)
    phi, y = examples(30)
    with_all, without_last = network("mlp"), network("mlp")
    private_steps(with_all, Units.group(phi * 100, y, None), 1, step, LOSS, PrivateRandomness())
    private_steps(without_last, Units.group(phi[:-1] * 100, y[:-1], None), 1, step, LOSS, PrivateRandomness())
    moved = [one - other for one, other in zip(with_all.parameters(), without_last.parameters(), strict=True)]
    assert torch.sqrt(sum(part.square().sum() for part in moved)).item() <= 0.2 * (1 + 1e-4)


@settings(deadline=None, max_examples=20)
@given(value=st.floats(-0.25, 0.25, width=32), sigma=st.sampled_from([0.7, 1.0, 30.0]))
def test_a_noised_sum_lies_on_the_grid_of_the_noise_whatever_it_was(value, sigma):
    step = silent(noise_multiplier=sigma, clipping_norm=0.5, declared_size=4, step_size=1.0)
    model = nn.Linear(5, 300)
    optimizer = SiteOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), step, PrivateRandomness())
    for parameter in model.parameters():
        parameter.summed_grad = torch.full_like(parameter, value)
    optimizer.add_noise()
    grid = 2.0 ** (math.floor(math.log2(sigma * 0.5)) - 10)
    for parameter in model.parameters():
        steps = parameter.grad.double() * 4 / grid
        assert (steps == steps.round()).all()
        assert steps.unique().numel() > 100


class Folding(nn.Module):
    """Makes two rows of each example, so that clipping bounds each half by itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, phi):
        return self.inner(torch.cat([phi, -phi])).reshape(2, len(phi), 3).mean(0)


def test_gradients_that_are_not_one_an_example_are_refused_before_they_are_summed():
    phi, y = examples(6)
    model = Folding()
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(RuntimeError, match="12 gradients for 6 examples"):
        private_steps(model, Units.group(phi, y, None), 1, silent(), LOSS, PrivateRandomness())
    assert all(torch.equal(old, weight) for old, weight in zip(before, model.parameters(), strict=True))


def test_a_step_holds_gradients_of_all_examples_only_where_opacus_clips():
    def model(between):
        return nn.Sequential(nn.Linear(5, 400), between, nn.Linear(400, 3))

    said, weights = 10_000 * (400 + 400 + 3), 5 * 400 + 400 + 400 * 3 + 3
    assert numbers_held(model(nn.ReLU()), (5,), 10_000) == said + KEPT_NUMBERS
    for_each = (400 + 400 + 3) + (weights + 1)
    assert numbers_held(model(nn.PReLU()), (5,), 10_000) == MICRO_BATCH * for_each
    assert numbers_held(model(nn.PReLU()), (5,), 10) == 10 * for_each
