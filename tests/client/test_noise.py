"""Private randomness has the distributions that the accountant assumes."""

import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from client.noise import AT_ONCE, PrivateRandomness

NOTHING_8 = np.zeros(8)


def test_two_tasks_never_share_a_stream_and_a_seed_repeats_one():
    assert (PrivateRandomness().noised(NOTHING_8, 1.0) != PrivateRandomness().noised(NOTHING_8, 1.0)).any()
    again = [PrivateRandomness.seeded(3, "cleveland", 1).noised(NOTHING_8, 1.0) for _ in range(2)]
    assert (again[0] == again[1]).all()
    assert (again[0] != PrivateRandomness.seeded(3, "cleveland", 2).noised(NOTHING_8, 1.0)).any()


def test_a_stream_never_gives_the_same_noise_again():
    stream = PrivateRandomness()
    drawn = np.concatenate([stream.noised(np.zeros(AT_ONCE + 8), 1.0) for _ in range(3)])
    pieces = drawn[: len(drawn) // 8 * 8].reshape(-1, 8)
    assert len(np.unique(pieces, axis=0)) == len(pieces)


@pytest.mark.parametrize(
    ("draw", "distribution"),
    [
        (lambda stream: stream.noised(np.full(200_001, 5.0), 3.0), stats.norm(5, 3)),
        (lambda stream: stream.uniform(200_001), stats.uniform()),
    ],
)
def test_draws_follow_their_law(draw, distribution):
    drawn = draw(PrivateRandomness.seeded("a law"))
    assert len(drawn) == 200_001
    assert stats.kstest(drawn, distribution.cdf).pvalue > 1e-3


def test_gaussians_are_independent():
    drawn = PrivateRandomness.seeded("pairs").noised(np.zeros(AT_ONCE), 1.0)
    cosines, sines = drawn[: AT_ONCE // 2], drawn[AT_ONCE // 2 :]
    assert stats.pearsonr(cosines, sines).pvalue > 1e-3
    assert stats.pearsonr(cosines**2, sines**2).pvalue > 1e-3
    assert stats.pearsonr(drawn[1:], drawn[:-1]).pvalue > 1e-3


@pytest.mark.parametrize("size", [0, 1, 10, 11, AT_ONCE])
def test_gaussians_are_box_mullers_of_the_key_stream(size):
    key, pairs = bytes(range(32)), (size + 1) // 2
    stream = Cipher(algorithms.ChaCha20(key, nonce=bytes(16)), mode=None).encryptor()
    words = [int.from_bytes(stream.update(bytes(8)), "little", signed=True) for _ in range(2 * pairs)]
    radius = np.sqrt([-2 * math.log((abs(word) + 0.5) / 2**63) for word in words[:pairs]])
    angle = np.array([2 * math.pi * word / 2**64 for word in words[pairs:]])
    wanted = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
    drawn = PrivateRandomness(key).noised(np.zeros(size), 1.0)
    assert np.abs(drawn - wanted).max(initial=0) <= 2.0**-11 + 1e-12  # half a step of the grid


@settings(deadline=None)
@given(
    sums=st.integers(1, 40).flatmap(
        lambda size: arrays.arrays(np.float32, size, elements=st.floats(-1e6, 1e6, width=32))
    ),
    deviation=st.floats(1e-6, 1e6),
)
def test_noised_sums_lie_on_a_grid_that_depends_on_the_deviation_alone(sums, deviation):
    grid = 2.0 ** (math.frexp(deviation)[1] - 1 - 10)  # log2 rounds up just below powers of two
    steps = PrivateRandomness().noised(sums.astype(np.float64), deviation) / grid
    assert (steps == steps.round()).all()


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_the_grid_is_as_fine_for_large_sums_as_for_small_ones(size):
    steps = PrivateRandomness().noised(np.full(300, size), 1.0) * 2.0**10
    assert 50 < np.count_nonzero(steps % 2 == 1) < 250


def test_without_noise_nothing_is_rounded():
    sums = np.array([1 / 3, 1e-20])
    assert (PrivateRandomness().noised(sums, 0.0) == sums).all()


def test_uniform_never_gives_zero_and_the_gaussian_is_always_finite():
    stream = PrivateRandomness()
    assert stream.uniform(100_000).min() > 0
    assert np.isfinite(stream.noised(np.zeros(100_000), 1.0)).all()


@pytest.mark.parametrize("word", [0, 1, 2**63 - 1, -(2**63), -1, 2**62, -(2**62)])
def test_every_word_of_the_key_stream_gives_a_finite_gaussian(word):
    class Fixed:
        def update(self, zeros):
            return word.to_bytes(8, "little", signed=True) * (len(zeros) // 8)

    stream = PrivateRandomness()
    stream._stream = Fixed()
    assert np.abs(stream.noised(np.zeros(2), 1.0)).max() < 9.5


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 2.0])
def test_discrete_laplace_weights_fall_by_e_to_the_epsilon(epsilon):
    drawn = PrivateRandomness.seeded("laplace", epsilon).discrete_laplace(400_000, epsilon)
    zero, one = (drawn == 0).mean(), (np.abs(drawn) == 1).mean() / 2
    assert zero == pytest.approx(np.tanh(epsilon / 2), rel=0.03)
    assert one / zero == pytest.approx(np.exp(-epsilon), rel=0.06)


def test_choice_is_even_over_each_patients_records():
    counts = np.array([1, 2, 5] * 20_000)
    drawn = PrivateRandomness.seeded("choice").choice(counts)
    assert (drawn >= 0).all() and (drawn < counts).all()
    assert np.bincount(drawn[2::3], minlength=5) / 20_000 == pytest.approx([0.2] * 5, abs=0.02)
