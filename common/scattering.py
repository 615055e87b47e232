"""Wavelet scattering of images: fixed features that need no training, hence no data and no privacy budget.

A scattering transform convolves an image with wavelets of several scales and orientations, takes the
modulus, does the same again to what came out, and blurs every result at the largest scale:
Sx = {x⋆φ, |x⋆ψ₁|⋆φ, ||x⋆ψ₁|⋆ψ₂|⋆φ}, each ψ₂ coarser than its ψ₁. What remains hardly moves when the image
is shifted or bent a little, and keeps what distinguishes edges and textures (Bruna & Mallat 2013,
arXiv:1203.1513, §2). In front of a linear head it is the strongest known start for learning from few images
under differential privacy without any public pictures (Tramèr & Boneh 2021, arXiv:2011.11660).

We write it ourselves because kymatio, the usual package, is unmaintained and does not import on a current
SciPy. The wavelets are Morlet's, as in the paper; their elongation across the wave (`SLANT`) follows its
authors' own software.

Convolution happens in the Fourier domain. What a wavelet of scale j leaves has a narrow band, so it is
subsampled by 2^j there, by folding the spectrum onto itself, before the inverse transform: most of the work
is done on small images. The blur is separable, so it and its subsampling are one small matrix on each side.
Filters are made in float64, images are transformed in float32.

Shapes: N images, C colours, H × W pixels (h × w once padded), L angles, P paths, R × S positions that remain.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, cos, pi, sin

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.errors import UserError

SIGMA = 0.8
"""Width in pixels of the finest wavelet's envelope, along the wave; at scale j it is SIGMA · 2^j."""
FREQUENCY = 0.75 * pi
"""Centre frequency of the finest wavelet in radians a pixel; at scale j it is FREQUENCY / 2^j."""
SLANT = 0.5
"""Width of a wavelet's envelope along the wave, as a share of the width across."""
IMAGES_AT_ONCE = 8
"""Images transformed together: enough to amortise calls, few enough to stay in a processor's cache."""


@dataclass(frozen=True)
class Bank:
    """The filters for images of one size.

    A signal that has been subsampled by 2^r is said to be at resolution r. Resolution r sees the wavelet of
    scale j as the wavelet of scale j − r, so each filter is kept once for each resolution at which it is
    needed.
    """

    wavelets: dict[tuple[int, int], Tensor]
    """ψ̂ (which is real) for each (scale j, resolution r ≤ j): (L, h/2^r, w/2^r) float32."""
    blurs: tuple[tuple[Tensor, Tensor], ...]
    """For each resolution r: blur, subsample and crop, down (R, h/2^r) and across (S, w/2^r)."""
    padding: tuple[int, int, int, int]
    """Reflected pixels left, right, above and below, as `torch.nn.functional.pad` takes them."""


@lru_cache(maxsize=8)
def bank(height: int, width: int, scales: int = 2, angles: int = 8) -> Bank:
    """Make the filters for images of one size.

    The wavelets are scaled together so that |φ̂(ω)|² + ½ Σ (|ψ̂(ω)|² + |ψ̂(−ω)|²) ≤ 1, with equality at one
    frequency (the Littlewood–Paley condition, §2.1 of the paper): then no step of the transform enlarges
    the distance of two images.

    Args:
        height: H.
        width: W.
        scales: J; the blur spans 2^J pixels.
        angles: L, the number of orientations in half a turn.

    Raises:
        UserError: if the image is too small to be padded by reflection.
    """
    step = 2**scales
    if min(height, width) < 2 * step:
        least = f"{2 * step}×{2 * step}"
        raise UserError(f"scattering takes images of {least} pixels or more, not {height}×{width}: use pca")
    rows, columns = ceil(height / step), ceil(width / step)
    size = (rows + 2) * step, (columns + 2) * step
    wavelets = {
        (j, r): _morlets(size[0] // 2**r, size[1] // 2**r, j - r, angles)
        for j in range(scales)
        for r in range(j + 1)
    }
    low_pass = torch.outer(*(_gaussian(_frequencies(n), SIGMA * step / 2) for n in size))
    finest = torch.cat([wavelets[j, 0] for j in range(scales)]).square().sum(0)
    mirrored = finest.flip(0, 1).roll((1, 1), (0, 1))
    room = (1 - low_pass.square()) / (finest + mirrored) * 2
    amplitude = room.flatten()[1:].min().sqrt()  # the first is the mean, which no wavelet passes
    return Bank(
        wavelets={key: (amplitude * wavelet).to(torch.float32) for key, wavelet in wavelets.items()},
        blurs=tuple(
            (_blur(rows, size[0], r, scales), _blur(columns, size[1], r, scales)) for r in range(scales)
        ),
        padding=(step, size[1] - width - step, step, size[0] - height - step),
    )


def scatter(images_NCHW: Tensor, scales: int = 2, angles: int = 8) -> Tensor:
    """Return the scattering coefficients of images: order 0, then 1, then 2.

    There are P = 1 + J·L + L²·J(J−1)/2 paths: 81 for J = 2 and L = 8, at 7 × 7 positions of a 28 × 28 image.

    Args:
        images_NCHW: Real images; each colour is transformed by itself.
        scales: J.
        angles: L.

    Returns:
        float32 coefficients of shape (N, C, P, R, S).

    Raises:
        UserError: if the images are too small (see `bank`).
    """
    cases, colours, height, width = images_NCHW.shape
    filters = bank(height, width, scales, angles)
    planes = images_NCHW.to(torch.float32).reshape(cases * colours, height, width)
    if not len(planes):  # a site may have no case; a transform of nothing is an error in torch
        return scatter(images_NCHW.new_zeros(1, 1, height, width), scales, angles)[:0].expand(
            0, colours, -1, -1, -1
        )
    batches = [planes[i : i + IMAGES_AT_ONCE] for i in range(0, len(planes), IMAGES_AT_ONCE)]
    paths = torch.cat([_scatter(batch, filters, scales) for batch in batches])
    return paths.reshape(cases, colours, *paths.shape[1:])


def _scatter(images_NHW: Tensor, filters: Bank, scales: int) -> Tensor:
    """Scatter a few grey images: (N, P, R, S)."""
    padded = pad(images_NHW[:, None], filters.padding, mode="reflect")
    order_1, order_2 = [], []
    spectrum = torch.fft.fft2(padded)
    for j in range(scales):
        edges = _filtered(spectrum, filters.wavelets[j, 0], 2**j)
        order_1.append(_blurred(edges, filters, j))
        coarser = range(j + 1, scales)
        if coarser:
            edges_spectrum = torch.fft.fft2(edges)
        for k in coarser:
            textures = _filtered(edges_spectrum, filters.wavelets[k, j], 2 ** (k - j))
            order_2.append(_blurred(textures, filters, k))
    return torch.cat([_blurred(padded, filters, 0), *order_1, *order_2], dim=1)


def _filtered(spectrum_NPhw: Tensor, wavelet_Lhw: Tensor, step: int) -> Tensor:
    """Return |x ⋆ ψ| at every `step`-th pixel, for each path and angle: (N, P·L, h/step, w/step)."""
    height, width = (n // step for n in wavelet_Lhw.shape[1:])
    spectrum_NP1hw = spectrum_NPhw.unsqueeze(2)
    folded_NPLhw = torch.zeros(())
    # Subsampling in space sums aliases of the spectrum. Summing at once never makes the large product.
    for top in range(0, step * height, height):
        for left in range(0, step * width, width):
            alias = (..., slice(top, top + height), slice(left, left + width))
            folded_NPLhw = folded_NPLhw + spectrum_NP1hw[alias] * wavelet_Lhw[alias]
    filtered_NPLhw: Tensor = torch.fft.ifft2(folded_NPLhw)
    return filtered_NPLhw.abs().flatten(1, 2) / step**2


def _blurred(signal_NPhw: Tensor, filters: Bank, resolution: int) -> Tensor:
    """Return x ⋆ φ at the positions that remain: (N, P, R, S)."""
    down_Rh, across_Sw = filters.blurs[resolution]
    return down_Rh @ signal_NPhw @ across_Sw.T


def _morlets(height: int, width: int, scale: int, angles: int) -> Tensor:
    """Return the transforms of Morlet wavelets of one scale: (L, h, w) float64.

    In space a Morlet wavelet is a plane wave under a Gaussian envelope, less as much of the envelope as
    makes its sum zero (§2.1 of the paper). The transform of a Gaussian is a Gaussian, so here it is one
    around the wave's frequency less a little of one around zero.
    """
    sigma, frequency = SIGMA * 2**scale, FREQUENCY / 2**scale
    down = _frequencies(height)[:, :, None, None]
    across = _frequencies(width)[None, None]
    wavelets = []
    for angle in (pi * n / angles for n in range(angles)):
        along_wave = cos(angle) * across + sin(angle) * down
        beside_wave = cos(angle) * down - sin(angle) * across
        beside = torch.exp(-((beside_wave * sigma / SLANT) ** 2) / 2)
        wave = (torch.exp(-(((along_wave - frequency) * sigma) ** 2) / 2) * beside).sum((1, 3))
        envelope = (torch.exp(-((along_wave * sigma) ** 2) / 2) * beside).sum((1, 3))
        wavelets.append(wave - wave[0, 0] / envelope[0, 0] * envelope)
    return torch.stack(wavelets)


def _gaussian(frequencies_nK: Tensor, sigma: float) -> Tensor:
    """Return the transform of a periodic Gaussian of unit sum: (n,) float64."""
    transform = torch.exp(-((frequencies_nK * sigma) ** 2) / 2).sum(1)
    return transform / transform[0]


def _frequencies(size: int) -> Tensor:
    """Return a discrete transform's frequencies in radians a pixel, each with four aliases: (n, 5) float64.

    Summing a transform over its aliases is sampling the signal in space.
    """
    turns_n: Tensor = torch.fft.fftfreq(size, dtype=torch.float64)
    return 2 * pi * (turns_n[:, None] + torch.arange(-2, 3, dtype=torch.float64))


def _blur(kept: int, size: int, resolution: int, scales: int) -> Tensor:
    """Return what blurs a line at one resolution, subsamples it and crops it: (R, h/2^r) float32."""
    length, step = size // 2**resolution, 2 ** (scales - resolution)
    kernel: Tensor = torch.fft.ifft(_gaussian(_frequencies(length), SIGMA * step / 2)).real
    positions = step * torch.arange(1, kept + 1)  # position 0 lies in the padding
    return kernel[(positions[:, None] - torch.arange(length)) % length].to(torch.float32)
