"""Private randomness: the noise, the Poisson masks, and which record stands for a patient.

Everything comes from one ChaCha20 key stream. A served custodian draws a fresh key from the operating
system for every task and never stores it; a simulation may derive the key from its seed, and says so in its
results. Opacus's own secure mode needs a package that can no longer be installed, so its hardening is done
here: a floating-point Gaussian betrays its value through the gaps between representable numbers (Mironov
2012), and the sum of four independent draws, divided by two, closes that hole as Opacus's secure mode does
(Holohan and Braghin 2021, arXiv:2107.10138, §5.2).
"""

import hashlib
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

HARDENING = 4
"""Independent Gaussians summed into one."""
AT_ONCE = 8192
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

    def gaussian(self, size: int) -> NDArray[np.float64]:
        """Draw standard Gaussians, each half the sum of four (Box–Muller on the key stream)."""
        drawn = np.empty(size)
        for start in range(0, size, AT_ONCE):
            piece = drawn[start : start + AT_ONCE]
            piece[:] = self._gaussian(len(piece))
        return drawn

    def _gaussian(self, size: int) -> NDArray[np.float64]:
        pairs = HARDENING * size // 2
        uniform = self.uniform(2 * pairs)
        radius, angle = np.log(uniform[:pairs]), uniform[pairs:]
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle *= 2.0 * np.pi
        # torch's are four times as fast as NumPy's.
        turn = torch.from_numpy(angle)
        normals = np.concatenate((turn.cos().numpy(), turn.sin().numpy())).reshape(2, pairs)
        normals *= radius
        summed: NDArray[np.float64] = normals.reshape(HARDENING, size).sum(axis=0)
        summed /= np.sqrt(HARDENING)
        return summed

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
