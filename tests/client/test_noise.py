"""Private randomness has the distributions that the accountant assumes."""

import numpy as np
import pytest
from scipy import stats

from client.noise import AT_ONCE, PrivateRandomness


def test_two_tasks_never_share_a_stream_and_a_seed_repeats_one():
    assert (PrivateRandomness().gaussian(8) != PrivateRandomness().gaussian(8)).all()
    again = [PrivateRandomness.seeded(3, "cleveland", 1).gaussian(8) for _ in range(2)]
    assert (again[0] == again[1]).all()
    assert (again[0] != PrivateRandomness.seeded(3, "cleveland", 2).gaussian(8)).all()


@pytest.mark.parametrize(
    ("draw", "distribution"),
    [
        (lambda stream: stream.gaussian(200_001), stats.norm()),
        (lambda stream: stream.uniform(200_001), stats.uniform()),
    ],
)
def test_draws_follow_their_law(draw, distribution):
    drawn = draw(PrivateRandomness.seeded("a law"))
    assert len(drawn) == 200_001
    assert stats.kstest(drawn, distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize("size", [0, 1, 10, AT_ONCE])
def test_gaussians_are_box_mullers_of_the_key_stream(size):
    stream = PrivateRandomness.seeded("one by one")
    radius = np.sqrt(-2 * np.log(stream.uniform(2 * size)))
    angle = 2 * np.pi * stream.uniform(2 * size)
    four = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(4, size)
    drawn = PrivateRandomness.seeded("one by one").gaussian(size)
    np.testing.assert_allclose(drawn, four.sum(axis=0) / 2, rtol=1e-12, atol=1e-14)


def test_uniform_never_gives_zero_and_the_gaussian_is_always_finite():
    stream = PrivateRandomness()
    assert stream.uniform(100_000).min() > 0
    assert np.isfinite(stream.gaussian(100_000)).all()


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
