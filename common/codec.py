"""Quantised logits: the payload that leaves a site.

A codec turns `logits_NC` into bytes of a length that depends on the shape alone, so that nothing about a
site shows in the size of its answer. `int8` centres every row (softmax does not see a constant added to a
row) and rounds to 8 bits under one scale for the whole message; `fp16` and `fp32` keep floats. Decoding
treats the bytes as hostile: the length must fit the shape exactly, and every value must come out finite.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

LARGEST_LOGIT = 1e4
"""Logits beyond this are cut before they leave and refused on arrival."""


class CodecError(ValueError):
    """The bytes are not what the codec and the shape call for."""


@dataclass(frozen=True)
class Codec:
    """One way to write logits down.

    Attributes:
        name: The value of the run-config key `codec`.
        number: Its number on the wire.
        itemsize: Bytes a value.
        pack: `logits_NC` to (scale, bytes).
        unpack: (flat bytes as array, scale) to float32 values.
        dtype: How the bytes are read back.
    """

    name: str
    number: int
    itemsize: int
    pack: Callable[[Floats], tuple[float, bytes]]
    unpack: Callable[[NDArray[np.generic], float], Floats]
    dtype: str

    def encode(self, logits_NC: Floats) -> tuple[float, bytes]:
        """Centre, bound and quantise.

        Args:
            logits_NC: Finite logits, or movements of logits.

        Returns:
            The scale of one step (1.0 for float codecs) and `N * C * itemsize` bytes.
        """
        bounded_NC = np.clip(centred(logits_NC), -LARGEST_LOGIT, LARGEST_LOGIT).astype(np.float32)
        return self.pack(bounded_NC)

    def decode(self, payload: bytes, scale: float, cases: int, classes: int) -> Floats:
        """Read `logits_NC` back.

        Raises:
            CodecError: if the length does not fit the shape, or the scale or a value is not finite or out
                of range.
        """
        if len(payload) != cases * classes * self.itemsize:
            raise CodecError(f"{len(payload)} bytes for {cases} cases × {classes} classes in {self.name}")
        if not np.isfinite(scale) or scale < 0:
            raise CodecError("the scale is not a finite number ≥ 0")
        values = self.unpack(np.frombuffer(payload, dtype=self.dtype), scale)
        if not np.isfinite(values).all() or np.abs(values).max(initial=0.0) > 2 * LARGEST_LOGIT:
            raise CodecError("a value is not finite or out of range")
        return values.reshape(cases, classes)


def centred(logits_NC: Floats) -> Floats:
    """Subtract each row's mean: the softmax of the row stays the same."""
    row_mean_N1 = logits_NC.mean(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(logits_NC - row_mean_N1, dtype=np.float32)


def _pack_int8(logits_NC: Floats) -> tuple[float, bytes]:
    largest = float(np.abs(logits_NC).max(initial=0.0))
    # The scale travels as float32: round it first, so that both sides multiply by the same number.
    scale = float(np.float32(largest / 127.0)) or 1.0
    steps = np.clip(np.rint(logits_NC / scale), -127, 127).astype("<i1")
    return scale, steps.tobytes()


def _unpack_scaled(steps: NDArray[np.generic], scale: float) -> Floats:
    return steps.astype(np.float32) * np.float32(scale)


def _unpack_float(values: NDArray[np.generic], scale: float) -> Floats:
    del scale  # float codecs carry the values themselves
    return values.astype(np.float32)


def _pack_float(dtype: str) -> Callable[[Floats], tuple[float, bytes]]:
    return lambda logits_NC: (1.0, logits_NC.astype(dtype).tobytes())


CODECS = {
    codec.name: codec
    for codec in (
        Codec("int8", 1, 1, _pack_int8, _unpack_scaled, "<i1"),
        Codec("fp16", 2, 2, _pack_float("<f2"), _unpack_float, "<f2"),
        Codec("fp32", 3, 4, _pack_float("<f4"), _unpack_float, "<f4"),
    )
}
BY_NUMBER = {codec.number: codec for codec in CODECS.values()}
