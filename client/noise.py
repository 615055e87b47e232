"""Private randomness: the noise, the Poisson masks, and which record stands for a patient.

Everything comes from one ChaCha20 key stream. A served custodian draws a fresh key from the operating
system for every task and never stores it; a simulation may derive the key from its seed, and says so in its
results. Opacus's own secure mode needs a package that can no longer be installed, so its hardening is done
here, by other means. A floating-point Gaussian betrays what it was added to through the gaps between the
numbers that can come out (Mironov 2012, "On significance of the least significant bits for differential
privacy"). So a noised sum is rounded, as he does with Laplace noise, to a grid that depends on the noise's
deviation alone. An exact Gaussian so rounded is as private as before, rounding being post-processing; numbers
of one grid come out whatever the sum is; and a step of it, about a thousandth of the deviation, hides where
floating-point numbers lie: more than 2³⁰ times closer, as long as the sum is at most a thousand deviations.
"""

import hashlib
import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

GRID_BITS = 10
"""A deviation is at least 2^GRID_BITS steps of the grid that noised sums lie on, and less than twice that."""
AT_ONCE = 16384
"""Gaussians made at once: so few that what they are made of stays in the processor's cache."""


class PrivateRandomness:
    """A stream of private random numbers under one ChaCha20 key.

    Args:
        key: 32 bytes. Leave it out to take a fresh one from the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        """Start the key stream."""
        cipher = Cipher(algorithms.ChaCha20(key or os.urandom(32), nonce=bytes(16)), mode=None)
        self._stream = cipher.encryptor()

    @classmethod
    def seeded(cls, *purpose: str | int | bytes) -> "PrivateRandomness":
        """Derive the stream from a seed: for simulations only, where nobody's privacy is at stake."""
        return cls(hashlib.sha256(b"\x1f".join(str(part).encode() for part in purpose)).digest())

    def uniform(self, size: int) -> NDArray[np.float64]:
        """Draw from (0, 1], with 53 random bits each."""
        words = np.frombuffer(self._stream.update(bytes(8 * size)), dtype="<u8") >> np.uint64(11)
        drawn = words.astype(np.float64)
        drawn += 1.0
        drawn *= 2.0**-53
        return drawn

    def noised(self, sum_P: NDArray[np.floating], deviation: float) -> NDArray[np.floating]:
        """Return a sum with Gaussian noise, rounded to a grid that depends on the deviation alone.

        Args:
            sum_P: What is to be hidden: one vector, finite.
            deviation: The noise's standard deviation, finite. Without any, nothing is rounded either.

        Returns:
            Multiples of the largest power of two up to deviation / 2^GRID_BITS, in the sum's precision.
        """
        if deviation == 0:
            return sum_P
        step = math.ldexp(1.0, math.frexp(deviation)[1] - 1 - GRID_BITS)
        noised_P = np.empty_like(sum_P)
        for start in range(0, len(sum_P), AT_ONCE):
            piece = slice(start, start + AT_ONCE)
            steps = np.multiply(sum_P[piece], 1 / step, dtype=np.float64)
            steps += self._gaussian(len(steps), deviation / step)
            np.rint(steps, out=steps)
            np.multiply(steps, step, out=noised_P[piece], casting="same_kind")
        return noised_P

    def _gaussian(self, size: int, deviation: float) -> NDArray[np.float64]:
        """Draw Gaussians by Box and Muller's method, from 64 random bits each.

        Cosine and sine are taken from the tangent t of half the angle, (1 − t²) / (1 + t²) and
        2 t / (1 + t²), since NumPy's tangent is several times as fast as these where a processor has AVX-512.
        No Gaussian is larger than √(128 ln 2) = 9.42 deviations, which the law exceeds once in 10²⁰ draws.
        """
        pairs = (size + 1) // 2
        words = np.frombuffer(self._stream.update(bytes(16 * pairs)), dtype="<i8").astype(np.float64)
        radius, tangent = words[:pairs], words[pairs:]
        np.abs(radius, out=radius)
        radius += 0.5
        radius *= 2.0**-63
        np.log(radius, out=radius)
        radius *= -2.0 * deviation**2
        np.sqrt(radius, out=radius)
        tangent *= math.pi * 2.0**-64
        np.tan(tangent, out=tangent)
        square = tangent * tangent
        radius /= square + 1.0
        np.subtract(1.0, square, out=square)
        square *= radius
        tangent *= 2.0
        tangent *= radius
        return np.concatenate((square, tangent))[:size]

    def poisson_mask(self, units: int, sample_rate: float) -> NDArray[np.bool_]:
        """Take every unit independently with probability `sample_rate`."""
        return self.uniform(units) <= sample_rate

    def choice(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each unit draw one index below its count: which record stands for a patient in this step."""
        drawn = np.ceil(self.uniform(len(counts)) * counts).astype(np.int64) - 1
        return np.clip(drawn, 0, counts - 1)

    def discrete_laplace(self, size: int, epsilon: float) -> NDArray[np.int64]:
        """Draw from P(k) ∝ exp(−ε·|k|): the difference of two geometric variables.

        A float Laplace can be attacked through its rounding, integers can't (Ghosh, Roughgarden,
        Sundararajan 2009).
        """
        geometric = np.floor(np.log(self.uniform(2 * size)) / -epsilon).astype(np.int64)
        return geometric[:size] - geometric[size:]
