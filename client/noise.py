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
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

HARDENING = 4
"""Independent Gaussians summed into one."""


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
        words = np.frombuffer(self._stream.update(bytes(8 * size)), dtype="<u8")
        return ((words >> np.uint64(11)) + 1).astype(np.float64) * 2.0**-53

    def gaussian(self, size: int) -> NDArray[np.float64]:
        """Draw standard Gaussians, each half the sum of four (Box–Muller on the key stream)."""
        draws = HARDENING * size
        pairs = (draws + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniform(pairs)))
        angle = 2.0 * np.pi * self.uniform(pairs)
        normals = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:draws]
        summed: NDArray[np.float64] = normals.reshape(HARDENING, size).sum(axis=0) / np.sqrt(HARDENING)
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
