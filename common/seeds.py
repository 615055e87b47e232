"""Public randomness, keyed by purpose.

Every random choice that may be public (splits, initial weights, the order of proxy cases) draws from a
stream named by the run's seed and its purpose, such as `(seed, "split")` or `(seed, "student", site)`.
Streams do not depend on the order in which they are asked for, so every backend gives the same result.
Private randomness never comes from here (`client.noise`).
"""

import hashlib

import numpy as np


def stream_key(seed: int, *purpose: str | int) -> int:
    """Return a 128-bit key for the stream of this seed and purpose."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return NumPy's generator for this seed and purpose."""
    return np.random.Generator(np.random.PCG64(stream_key(seed, *purpose)))


def torch_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed for `torch.manual_seed` or a `torch.Generator` (63 bits)."""
    return stream_key(seed, *purpose) >> 65
