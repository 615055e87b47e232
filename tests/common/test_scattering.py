"""The fast scattering transform beside a naive one, and the properties that make it worth having."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from common.errors import UserError
from common.scattering import bank, scatter


def images(count, side=28, seed=0):
    """Bright ellipses on a dark ground, as smooth as photographed clothes."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:side, :side] / side - 0.5
    found = []
    for tilt, width, height in rng.uniform((0, 0.1, 0.2), (np.pi, 0.2, 0.35), size=(count, 3)):
        along, beside = (
            np.cos(tilt) * across + np.sin(tilt) * down,
            np.cos(tilt) * down - np.sin(tilt) * across,
        )
        found.append(1 / (1 + np.exp(((along / height) ** 2 + (beside / width) ** 2 - 1) * 4)))
    return torch.tensor(np.array(found)[:, None], dtype=torch.float32)


def convolved(x_hw, transform_hw, step):
    """Circular convolution by its definition, then every `step`-th pixel."""
    kernel_hw = np.fft.ifft2(transform_hw)
    height, width = x_hw.shape
    total = np.zeros_like(kernel_hw)
    for row in range(height):
        for column in range(width):
            if x_hw[row, column]:
                total += x_hw[row, column] * np.roll(kernel_hw, (row, column), axis=(0, 1))
    return total[::step, ::step]


def naive_scatter(image_HW, subsample):
    """Scatter by direct convolution, subsampling as the fast path does or only at the very end."""
    filters = bank(28, 28)
    padded = pad(image_HW[None, None], filters.padding, mode="reflect")[0, 0].double().numpy()

    def wavelets(scale, resolution):
        return filters.wavelets[scale, resolution].double().numpy()

    def blurred(x_hw, resolution):
        """Blur by the full-size Gaussian, one pixel at a time, at the positions that are left."""
        frequencies = [
            2 * np.pi * np.fft.fftfreq(n)[:, None] + 2 * np.pi * np.arange(-2, 3) for n in x_hw.shape
        ]
        lines = [np.exp(-((1.6 / 2**resolution * f) ** 2) / 2).sum(axis=1) for f in frequencies]
        gaussian_hw = np.outer(lines[0] / lines[0][0], lines[1] / lines[1][0])
        return convolved(x_hw, gaussian_hw, 4 // 2**resolution).real[1:8, 1:8]

    order_1, order_2 = [], []
    for j in range(2):
        r = j if subsample else 0
        for wavelet in wavelets(j, 0):
            edges = abs(convolved(padded, wavelet, 2**r))
            order_1.append(blurred(edges, r))
            for k in range(j + 1, 2):
                s = k if subsample else 0
                for coarser in wavelets(k, r):
                    order_2.append(blurred(abs(convolved(edges, coarser, 2 ** (s - r))), s))
    return np.stack([blurred(padded, 0), *order_1, *order_2])


def test_fast_is_naive():
    image = images(1, seed=3)
    fast_PRS = scatter(image)[0, 0].numpy()
    assert np.abs(fast_PRS - naive_scatter(image[0, 0], subsample=True)).max() < 1e-5


def test_subsampling_loses_next_to_nothing():
    image = images(1, seed=4)
    fast_PRS = scatter(image)[0, 0].numpy()
    full_PRS = naive_scatter(image[0, 0], subsample=False)
    for order in (slice(0, 1), slice(1, 17), slice(17, 81)):
        assert np.linalg.norm(fast_PRS[order] - full_PRS[order]) < 0.03 * np.linalg.norm(full_PRS[order])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 1, 28, 28), (2, 1, 81, 7, 7)),
        ((1, 3, 32, 20), (1, 3, 81, 8, 5)),
        ((0, 1, 28, 28), (0, 1, 81, 7, 7)),
    ],
)
def test_shapes(shape, expected):
    assert scatter(torch.rand(shape)).shape == expected
    assert scatter(torch.rand(shape)).dtype == torch.float32


def test_three_scales():
    assert scatter(torch.rand(1, 1, 32, 32), scales=3, angles=4).shape == (1, 1, 1 + 12 + 48, 4, 4)


def test_the_filters_pass_no_energy_twice():
    filters = bank(28, 28)
    power = sum(
        wavelet.double().square().sum(dim=0) for (_, r), wavelet in filters.wavelets.items() if r == 0
    )
    power = (power + power.flip(0, 1).roll((1, 1), (0, 1))) / 2
    lines = [torch.exp(-((1.6 * 2 * np.pi * torch.fft.fftfreq(36, dtype=torch.float64)) ** 2) / 2)] * 2
    total = power + torch.outer(*lines).square()
    assert total.max() < 1 + 1e-3
    assert total.max() > 0.99
    assert power[0, 0] < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1))
def test_scattering_never_enlarges_a_distance(seed, scale):
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, 1, 1, 28, 28, generator=rng)
    y = x + scale * (y - x)
    apart = pad(x - y, bank(28, 28).padding, mode="reflect").norm()
    # A coefficient stands for 4 × 4 pixels.
    assert 4 * (scatter(x) - scatter(y)).norm() <= 1.01 * apart


def test_energy_decays_with_the_order():
    energy = [
        scatter(images(8))[:, :, order].square().sum().item()
        for order in (slice(0, 1), slice(1, 17), slice(17, 81))
    ]
    assert energy[0] > 3 * energy[1] > 9 * energy[2] > 0


def test_a_shift_hardly_shows():
    x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    shifted = x.roll(1, dims=3)  # to a pixel, it is another image: √2 away
    assert (x - shifted).norm() > 1.3 * (x - x.mean()).norm()
    assert (scatter(x) - scatter(shifted)).norm() < 0.25 * scatter(x - x.mean()).norm()


def test_an_even_image_has_no_edges():
    coefficients_P = scatter(torch.full((1, 1, 28, 28), 0.7))[0, 0]
    assert torch.allclose(coefficients_P[0], torch.full((7, 7), 0.7), atol=1e-5)
    assert coefficients_P[1:].abs().max() < 1e-5


def test_transposing_mirrors_the_angles():
    x = images(4)
    plain_NPRS, transposed_NPRS = scatter(x)[:, 0], scatter(x.transpose(2, 3))[:, 0]
    mirrored = [(4 - angle) % 8 for angle in range(8)]
    for first in (1, 9):
        assert torch.allclose(
            transposed_NPRS[:, first : first + 8],
            plain_NPRS[:, [first + n for n in mirrored]].transpose(2, 3),
            atol=1e-5,
        )


def test_the_wave_of_an_edge_runs_across_it():
    stripes = (
        (torch.arange(28) % 4 < 2).float().expand(1, 1, 28, 28)
    )  # vertical stripes: a wave from left to right
    energy_L = scatter(stripes)[0, 0, 1:17].sum(dim=(1, 2)).reshape(2, 8).sum(dim=0)
    assert energy_L.argmax() == 0


def test_the_same_images_give_the_same_bits_in_any_company():
    x = images(20)
    together = scatter(x)
    assert torch.equal(together, scatter(x))
    assert torch.allclose(together[13:14], scatter(x[13:14]), atol=1e-6)


def test_too_small_an_image_is_refused():
    with pytest.raises(UserError, match="8×8 pixels or more, not 28×6"):
        scatter(torch.rand(1, 1, 28, 6))
