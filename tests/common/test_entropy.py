"""Entropy coding: near the empirical entropy for any distribution; hostile bytes are refused or canonical."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.entropy import EntropyError, longest, read, write

SIZES = st.one_of(st.integers(1, 600), st.integers(1, 30_000), st.sampled_from([1, 9, 3_600, 27_000]))


def entropy_bytes(symbols_n) -> float:
    """n·H of the symbols' own frequencies, in bytes, by the definition."""
    total = len(symbols_n)
    return sum(count * math.log2(total / count) for count in Counter(symbols_n.tolist()).values()) / 8


def constant(rng, size):
    return np.eye(size)[rng.integers(size)]


def two_levels(rng, size):
    return 10.0 ** -rng.uniform(0, 4) * constant(rng, size) + constant(rng, size)


def one_above_a_floor(rng, size):
    return 10.0 ** -rng.uniform(0, 6) + constant(rng, size)


def some_equally(rng, size):
    return np.isin(np.arange(size), rng.permutation(size)[: rng.integers(1, size + 1)])


def bell(rng, size):
    return np.exp(-0.5 * ((np.arange(size) - size / 2) / 10.0 ** rng.uniform(-1, 3)) ** 2)


def power_law(rng, size):
    return rng.permutation((1.0 + np.arange(size)) ** -rng.uniform(0, 4))


def dirichlet(rng, size):
    return rng.dirichlet(np.full(size, 10.0 ** rng.uniform(-2, 1))) + 1e-300


SHAPES = [constant, two_levels, one_above_a_floor, some_equally, bell, power_law, dirichlet]


def draw(shape, bits, size, seed):
    rng = np.random.default_rng(seed)
    weights = np.asarray(shape(rng, 2**bits), dtype=np.float64)
    return rng.choice(2**bits, size, p=weights / weights.sum()).astype(np.int32)


@pytest.mark.parametrize("shape", SHAPES)
@settings(deadline=None)
@given(bits=st.sampled_from([1, 2, 4, 8]), size=SIZES, seed=st.integers(0, 2**32))
def test_any_distribution_is_near_its_entropy_and_reads_back(shape, bits, size, seed):
    symbols_n = draw(shape, bits, size, seed)
    message = write(symbols_n, bits)
    assert len(message) <= 1.1 * entropy_bytes(symbols_n) + 64
    assert len(message) <= longest(size, bits)
    assert (read(message, size, bits) == symbols_n).all()


@given(bits=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_any_symbols_read_back(bits, data):
    symbols_n = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40)), np.int32)
    message = write(symbols_n, bits)
    assert len(message) <= longest(len(symbols_n), bits)
    assert (read(message, len(symbols_n), bits) == symbols_n).all()


def test_a_constant_takes_a_few_bytes_at_any_size():
    for size in (1, 30_000, 1_000_000):
        assert len(write(np.full(size, 77, dtype=np.int32), 8)) < 32


@settings(deadline=None, max_examples=400)
@given(
    message=st.binary(max_size=300),
    size=st.integers(1, 300),
    bits=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
)
@example(message=b"", size=1, bits=8, data=None)
@example(message=b"\x00", size=300, bits=8, data=None)
@example(message=b"\x09\x01", size=1, bits=8, data=None)
def test_hostile_bytes_are_refused_or_are_what_a_writer_writes(message, size, bits, data):
    if data is not None and data.draw(st.booleans()):  # a true message, bent a little
        bent = bytearray(write(draw(dirichlet, bits, size, data.draw(st.integers(0, 99))), bits))
        for _ in range(data.draw(st.integers(0, 3))):
            bent[data.draw(st.integers(0, len(bent) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        message = bytes(bent[: data.draw(st.integers(0, len(bent)))] if data.draw(st.booleans()) else bent)
    try:
        symbols_n = read(message, size, bits)
    except EntropyError:
        return
    assert symbols_n.shape == (size,) and symbols_n.min() >= 0 and symbols_n.max() < 2**bits
    assert len(message) <= longest(size, bits)


def test_what_was_cut_short_is_noticed():
    for bits in (1, 2, 4, 8):
        for size in (1, 30, 184, 500):
            message = write(draw(bell, bits, size, size), bits)
            for kept in range(len(message)):
                with pytest.raises(EntropyError):
                    read(message[:kept], size, bits)


@given(tail=st.binary(min_size=1, max_size=16))
def test_nothing_can_be_hidden_behind_a_message(tail):
    symbols_n = draw(bell, 4, 500, 0)
    try:
        again_n = read(write(symbols_n, 4) + tail, 500, 4)
    except EntropyError:
        return
    assert (again_n != symbols_n).any()
