"""Quantised logits: the payload that leaves a site.

Most codecs turn `logits_NC` into bytes in three steps:

1. Softmax does not see a constant added to a row, so a row of C logits is C − 1 numbers: its coordinates in
   an orthonormal basis of the rows that add up to zero (Helmert's).
2. The coordinates are rounded to a few levels under one scale for the whole message.
3. The levels are entropy-coded (`common.entropy`).

| codec | levels | scale: one step is |
|---|---|---|
| `int8` | −127 … 127 | the largest value / 127 |
| `int4` | −7 … 7 | that of least squared error, but at least half the root mean square |
| `int2` | −1, 0, 1 | that of least squared error, but at least 1.5 times the root mean square |
| `int1` | −1, 1 | the mean size, which has the least squared error |

Finer steps than these cost bytes and gain nothing where a site says later what it could not say at once
(`client.student`). `fp16` and `fp32` keep centred rows of floats, and their length depends on the shape
alone. The length of the others depends on the levels that travel, and on nothing else.

Decoding treats the bytes as hostile. Whoever decodes knows the shape, so memory is bounded before a byte is
read; bytes that no encoder writes are refused; every value comes out finite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common import entropy

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

LARGEST_LOGIT = 1e4
"""Coordinates (of float codecs: logits) beyond this are cut before they leave, beyond its double refused."""

SCALES_TRIED = 24


class CodecError(ValueError):
    """The bytes are not what the codec and the shape call for."""


class Codec(Protocol):
    """One way to write logits down.

    Attributes:
        name: The value of the run-config key `codec`.
        number: Its number on the wire.
        feedback: Whether it cuts off so much that a site adds it to what it says next.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def number(self) -> int: ...  # noqa: D102
    @property
    def feedback(self) -> bool: ...  # noqa: D102

    def encode(self, logits_NC: Floats) -> tuple[float, bytes]:
        """Centre, bound and quantise finite logits, or movements of logits.

        Returns:
            The size of one step (1.0 for float codecs) and the payload.
        """

    def decode(self, payload: bytes, scale: float, cases: int, classes: int) -> Floats:
        """Read `logits_NC` back.

        Raises:
            CodecError: if no encoder writes these bytes for this shape, or the scale or a value is not finite
                or out of range.
        """

    def longest(self, cases: int, classes: int) -> int:
        """The most bytes of a payload of this shape."""


@dataclass(frozen=True)
class LevelCodec:
    """A few levels of the rows' coordinates, entropy-coded.

    Attributes:
        levels: Ascending, in steps.
        scale_of: Chooses the size of a step for `values_n`.
    """

    name: str
    number: int
    levels: tuple[int, ...]
    scale_of: Callable[[Doubles], float]
    feedback: bool

    def encode(self, logits_NC: Floats) -> tuple[float, bytes]:
        """Quantise under one scale; see `Codec`."""
        values_n = np.clip(coordinates(logits_NC), -LARGEST_LOGIT, LARGEST_LOGIT).reshape(-1)
        # The scale travels as float32: round it first, so that both sides multiply by the same number.
        scale = float(np.float32(self.scale_of(values_n)))
        levels = np.array(self.levels)
        between = (levels[1:] + levels[:-1]) / 2
        symbols_n = np.searchsorted(between, values_n / (scale or 1.0)).astype(np.int32)
        return scale, entropy.write(symbols_n, self._bits)

    def decode(self, payload: bytes, scale: float, cases: int, classes: int) -> Floats:
        """Read levels and scale them; see `Codec`."""
        if not 0 <= scale * max(self.levels) <= 2 * LARGEST_LOGIT:
            raise CodecError("the scale is not finite or out of range")
        try:
            symbols_n = entropy.read(payload, cases * (classes - 1), self._bits)
        except entropy.EntropyError as error:
            raise CodecError(f"{error} ({cases} cases × {classes} classes in {self.name})") from None
        if symbols_n.max(initial=0) >= len(self.levels):
            raise CodecError(f"a level that {self.name} doesn't have")
        return from_coordinates(np.array(self.levels)[symbols_n].reshape(cases, classes - 1) * scale)

    def longest(self, cases: int, classes: int) -> int:
        """As long as levels that can't be told in fewer bytes; see `Codec`."""
        return entropy.longest(cases * (classes - 1), self._bits)

    @property
    def _bits(self) -> int:
        return (len(self.levels) - 1).bit_length()


@dataclass(frozen=True)
class FloatCodec:
    """Centred rows of floats."""

    name: str
    number: int
    dtype: str
    feedback: bool = False

    def encode(self, logits_NC: Floats) -> tuple[float, bytes]:
        """Centre and write; see `Codec`."""
        bounded_NC = np.clip(centred(logits_NC), -LARGEST_LOGIT, LARGEST_LOGIT)
        return 1.0, bounded_NC.astype(self.dtype).tobytes()

    def decode(self, payload: bytes, scale: float, cases: int, classes: int) -> Floats:
        """Read; see `Codec`."""
        if len(payload) != self.longest(cases, classes):
            raise CodecError(f"{len(payload)} bytes for {cases} cases × {classes} classes in {self.name}")
        if scale != 1.0:
            raise CodecError(f"a scale in {self.name}, which has none")
        values_NC = np.frombuffer(payload, self.dtype).astype(np.float32).reshape(cases, classes)
        if not np.isfinite(values_NC).all() or np.abs(values_NC).max(initial=0.0) > 2 * LARGEST_LOGIT:
            raise CodecError("a value is not finite or out of range")
        return values_NC

    def longest(self, cases: int, classes: int) -> int:
        """As long as all payloads of this shape; see `Codec`."""
        return cases * classes * np.dtype(self.dtype).itemsize


def centred(logits_NC: Floats) -> Floats:
    """Subtract each row's mean: the softmax of the row stays the same."""
    row_mean_N1 = logits_NC.mean(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(logits_NC - row_mean_N1, dtype=np.float32)


def coordinates(logits_NC: Floats) -> Doubles:
    """Each row's C − 1 coordinates among the rows that add up to zero, in Helmert's basis.

    Coordinate k, from 1, weighs the first k logits against the next: (x_1 + … + x_k − k·x_{k+1}) / √(k(k+1)).
    """
    k = np.arange(1, logits_NC.shape[1])
    sums_NK = np.cumsum(logits_NC, axis=1, dtype=np.float64)[:, :-1]
    return np.asarray((sums_NK - k * logits_NC[:, 1:].astype(np.float64)) / np.sqrt(k * (k + 1.0)))


def from_coordinates(coordinates_NK: Doubles) -> Floats:
    """The rows, adding up to zero, that have these coordinates."""
    cases, dimensions = coordinates_NK.shape
    k = np.arange(1, dimensions + 1)
    shares_NK = coordinates_NK / np.sqrt(k * (k + 1.0))
    logits_NC = np.zeros((cases, dimensions + 1))
    logits_NC[:, :-1] = np.cumsum(shares_NK[:, ::-1], axis=1)[:, ::-1]
    logits_NC[:, 1:] -= k * shares_NK
    return logits_NC.astype(np.float32)


def _largest_over(most: int) -> Callable[[Doubles], float]:
    return lambda values_n: float(np.abs(values_n).max(initial=0.0)) / most


def _least_error(most: int, finest: float) -> Callable[[Doubles], float]:
    """The step of least squared error under levels −most … most, at least `finest` root mean squares."""

    def scale_of(values_n: Doubles) -> float:
        largest = float(np.abs(values_n).max(initial=0.0)) / most
        least = finest * float(np.sqrt(np.square(values_n).mean()))
        if least >= largest or least < np.finfo(np.float32).tiny:
            return largest
        steps = np.geomspace(least, largest, SCALES_TRIED)
        return float(min(steps, key=lambda step: _squared_error(values_n, step, most)))

    return scale_of


def _squared_error(values_n: Doubles, step: float, most: int) -> float:
    return float(np.square(values_n - step * np.clip(np.rint(values_n / step), -most, most)).sum())


def _mean_size(values_n: Doubles) -> float:
    return float(np.abs(values_n).mean())


def _around_zero(most: int) -> tuple[int, ...]:
    return tuple(range(-most, most + 1))


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        LevelCodec("int8", 1, _around_zero(127), _largest_over(127), feedback=False),
        FloatCodec("fp16", 2, "<f2"),
        FloatCodec("fp32", 3, "<f4"),
        LevelCodec("int4", 4, _around_zero(7), _least_error(7, finest=0.5), feedback=True),
        LevelCodec("int2", 5, _around_zero(1), _least_error(1, finest=1.5), feedback=True),
        LevelCodec("int1", 6, (-1, 1), _mean_size, feedback=True),
    )
}
BY_NUMBER = {codec.number: codec for codec in CODECS.values()}
