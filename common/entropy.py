"""Entropy coding of small whole numbers by asymmetric numeral systems (Duda 2013, arXiv:1311.2540).

The coder is `constriction`'s; what stands here is the model that it follows, and how the model travels. A
message of n symbols of b bits each is one byte, the number s of low bits that are sent as they are; two bytes
of the symbols' CRC-32, since almost any bytes are some message to the coder, also one that was cut short; and
one stack of the coder that holds, in the order in which they are read:

1. the histogram of the symbols' high b − s bits: how many of the n fall into the lower half of the alphabet,
   then how many of those into its lower quarter, and so on, each as a number between 0 and the whole;
2. the high bits themselves, under exactly that histogram;
3. the low bits, all equally likely.

The writer takes the s that makes it shortest. With s = 0 the length is the empirical entropy and the
histogram, which costs little where few symbols occur; s = b sends everything as it is, so no message is
longer than `longest`; what lies between suits smooth distributions over many symbols.

The bytes are as hostile as any. The coder reads any words without complaint, the caller says how many symbols
it reads, and with the same s what was read must give the same bytes when written again. So nothing can hide
in them but the choice of s, which every reader sees.
"""

import zlib
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.int32]

MOST_SYMBOLS = 2**24 - 1
"""The coder's probabilities have 24 bits."""

HEAD = 3
"""Bytes before the stack."""

_AnsCoder = constriction.stream.stack.AnsCoder
_Categorical = constriction.stream.model.Categorical
_Uniform = constriction.stream.model.Uniform


class EntropyError(ValueError):
    """The bytes are not what the writer would have written."""


def longest(count: int, bits: int) -> int:
    """The most bytes that `count` symbols of `bits` bits take."""
    return HEAD + (count * bits + 7) // 8 + 6


def write(symbols_n: Symbols, bits: int) -> bytes:
    """Write down symbols between 0 and 2^bits − 1.

    Args:
        symbols_n: At most `MOST_SYMBOLS` of them.
        bits: At least 1.
    """
    return _write(symbols_n, bits, _best_low_bits(symbols_n, bits))


def read(message: bytes, count: int, bits: int) -> Symbols:
    """Read `count` symbols back.

    Raises:
        EntropyError: if `message` is not what writing them gives.
    """
    if not HEAD <= len(message) <= longest(count, bits) or message[0] > bits:
        raise EntropyError("a length or a first byte that no writer gives")
    low_bits, stack = message[0], message[HEAD:]
    words = np.frombuffer(stack + bytes(-len(stack) % 4), dtype="<u4").astype(np.uint32)
    if len(words) and words[-1] == 0:
        raise EntropyError("zeros at the end")
    coder = _AnsCoder(words)
    symbols_n = np.zeros(count, dtype=np.int32)
    if low_bits < bits:
        histogram = _read_histogram(coder, count, bits - low_bits)
        symbols_n += coder.decode(_model(histogram), count) << low_bits
    if low_bits:
        symbols_n += coder.decode(_Uniform(2**low_bits), count)
    if _write(symbols_n, bits, low_bits) != message:
        raise EntropyError("not as a writer writes it")
    return symbols_n


def _write(symbols_n: Symbols, bits: int, low_bits: int) -> bytes:
    coder = _AnsCoder()  # a stack: what is read first is written last
    if low_bits:
        coder.encode_reverse(symbols_n & (2**low_bits - 1), _Uniform(2**low_bits))
    if low_bits < bits:
        high_n = symbols_n >> low_bits
        histogram = np.bincount(high_n, minlength=2 ** (bits - low_bits))
        coder.encode_reverse(high_n, _model(histogram))
        for lower, whole in reversed(_splits(histogram)):
            coder.encode_reverse(lower, _Uniform(), whole + 1)
    # The last word is never zero, so that its leading zeros need not be sent.
    stack: bytes = coder.get_compressed().astype("<u4").tobytes()
    check = zlib.crc32(symbols_n.astype(np.uint8).tobytes()).to_bytes(4, "little")[: HEAD - 1]
    return bytes([low_bits]) + check + stack.rstrip(b"\0")


def _model(histogram: NDArray[np.int64]) -> object:
    return _Categorical(histogram.astype(np.float64), perfect=False)


def _splits(histogram: NDArray[np.int64]) -> list[tuple[Symbols, Symbols]]:
    """How the symbols part in two, from the whole alphabet down: (in the lower half, in both), if any are."""
    splits, counts = [], histogram
    while len(counts) > 1:
        pairs = counts.reshape(-1, 2)
        whole = pairs.sum(axis=1)
        some = whole > 0
        splits.append((pairs[some, 0].astype(np.int32), whole[some].astype(np.int32)))
        counts = whole
    return splits[::-1]


def _read_histogram(coder: Any, count: int, bits: int) -> NDArray[np.int64]:
    counts = np.array([count])
    for _ in range(bits):
        some = counts > 0
        lower = np.zeros(len(counts), dtype=np.int64)
        lower[some] = coder.decode(_Uniform(), (counts[some] + 1).astype(np.int32))
        counts = np.stack([lower, counts - lower], axis=1).reshape(-1)
    return counts


def _best_low_bits(symbols_n: Symbols, bits: int) -> int:
    """The number of low bits that are best sent as they are."""
    count, histogram, lengths = len(symbols_n), np.bincount(symbols_n, minlength=2**bits), []
    for low_bits in range(bits):
        seen = histogram[histogram > 0]
        entropy = count * np.log2(count) - (seen * np.log2(seen)).sum()
        description = sum(np.log2(whole + 1).sum() for _, whole in _splits(histogram))
        lengths.append(entropy + description + count * low_bits)
        histogram = histogram.reshape(-1, 2).sum(axis=1)
    return int(np.argmin([*lengths, count * bits]))
