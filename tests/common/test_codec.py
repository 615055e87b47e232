"""Codecs: what is decoded is what was meant, and hostile bytes raise `CodecError` and nothing else."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from common import entropy
from common.codec import CODECS, LARGEST_LOGIT, CodecError, centred, coordinates, from_coordinates

LEVELS = [name for name in CODECS if name.startswith("int")]
FLOATS = ["fp16", "fp32"]
logits = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12),
    elements=st.floats(-1e6, 1e6, width=32),
)


def roundtrip(name, logits_NC):
    scale, payload = CODECS[name].encode(logits_NC)
    assert len(payload) <= CODECS[name].longest(*logits_NC.shape)
    # The scale travels as float32.
    return CODECS[name].decode(payload, float(np.float32(scale)), *logits_NC.shape), scale


def bounded(logits_NC):
    return from_coordinates(np.clip(coordinates(logits_NC), -LARGEST_LOGIT, LARGEST_LOGIT))


@given(logits_NC=logits)
@example(logits_NC=np.array([[3e-31, 0]], dtype=np.float32))
def test_coordinates_keep_lengths_and_give_the_centred_rows_back(logits_NC):
    meant_NC = centred(logits_NC).astype(np.float64)  # in float32 the squares of small ones are zero
    found_NK = coordinates(logits_NC)
    size = np.abs(logits_NC).max() + 1e-30
    assert found_NK.shape == (len(logits_NC), logits_NC.shape[1] - 1)
    np.testing.assert_allclose(
        np.linalg.norm(found_NK, axis=1), np.linalg.norm(meant_NC, axis=1), atol=1e-5 * size
    )
    np.testing.assert_allclose(from_coordinates(found_NK), meant_NC, atol=1e-5 * size)


@pytest.mark.parametrize("name", FLOATS)
@given(logits_NC=logits)
def test_floats_are_the_centred_logits_and_their_length_depends_on_the_shape_alone(name, logits_NC):
    read_NC, _ = roundtrip(name, logits_NC)
    meant_NC = np.clip(centred(logits_NC), -LARGEST_LOGIT, LARGEST_LOGIT)
    tolerance = {"fp16": 1e-3 * np.abs(meant_NC).max() + 1e-6, "fp32": 0.0}[name]
    assert np.abs(read_NC - meant_NC).max() <= tolerance
    lengths = {len(CODECS[name].encode(one)[1]) for one in (logits_NC, np.zeros_like(logits_NC))}
    assert lengths == {CODECS[name].longest(*logits_NC.shape)}


@given(logits_NC=logits)
def test_int8_is_within_half_a_step_in_every_coordinate(logits_NC):
    read_NC, scale = roundtrip("int8", logits_NC)
    meant_NK = coordinates(bounded(logits_NC))
    smallest = np.finfo(np.float32).tiny  # below float32's normal numbers the scale has no precision
    error_NK = np.abs(coordinates(read_NC) - meant_NK)
    assert error_NK.max() <= 0.501 * scale + 1e-5 * np.abs(meant_NK).max() + 130 * smallest


@pytest.mark.parametrize("name", LEVELS)
@given(logits_NC=logits)
def test_no_codec_is_worse_than_saying_nothing(name, logits_NC):
    read_NC, _ = roundtrip(name, logits_NC)
    meant_NC = bounded(logits_NC)
    error, silence = (np.square(one.astype(np.float64)).sum() for one in (read_NC - meant_NC, meant_NC))
    assert error <= silence * (1 + 1e-5) + 1e-30


@pytest.mark.parametrize("name", CODECS)
def test_zeros_are_zeros(name):
    read_NC, _ = roundtrip(name, np.zeros((5, 3), dtype=np.float32))
    assert not read_NC.any()


def test_more_bits_lose_less():
    logits_NC = np.random.default_rng(0).normal(size=(400, 10)).astype(np.float32)
    lost = [np.square(roundtrip(name, logits_NC)[0] - centred(logits_NC)).mean() for name in LEVELS]
    lengths = [len(CODECS[name].encode(logits_NC)[1]) for name in LEVELS]
    assert LEVELS == ["int8", "int4", "int2", "int1"]
    assert lost == sorted(lost) and lengths == sorted(lengths, reverse=True)
    assert lost[0] < 0.0002 and lost[1] < 0.03 and lost[2] < 0.3 and lost[3] < 0.4


@pytest.mark.parametrize("name", LEVELS)
def test_what_was_read_can_be_said_again_without_loss(name):
    logits_NC = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    read_NC, scale = roundtrip(name, logits_NC)
    if name in ("int8", "int1"):  # of these the scale follows from the levels
        again_NC, _ = roundtrip(name, read_NC)
        np.testing.assert_allclose(again_NC, read_NC, atol=1e-5)
    assert np.abs(coordinates(read_NC) / scale - np.rint(coordinates(read_NC) / scale)).max() < 1e-4


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=200)
@given(
    payload=st.binary(max_size=64),
    scale=st.one_of(st.just(1.0), st.floats(width=32)),
    cases=st.integers(1, 8),
    classes=st.integers(2, 8),
)
def test_hostile_bytes_decode_to_finite_values_or_are_refused(name, payload, scale, cases, classes):
    try:
        read_NC = CODECS[name].decode(payload, scale, cases, classes)
    except CodecError:
        return
    assert read_NC.shape == (cases, classes)
    assert np.linalg.norm(read_NC, axis=1).max() <= 2.01 * LARGEST_LOGIT * classes**0.5


@pytest.mark.parametrize("name", LEVELS)
@given(data=st.data(), cases=st.integers(1, 20), classes=st.integers(2, 6))
def test_bent_payloads_decode_to_finite_values_or_are_refused(name, data, cases, classes):
    logits_NC = np.random.default_rng(cases).normal(size=(cases, classes)).astype(np.float32)
    scale, payload = CODECS[name].encode(logits_NC)
    bent = bytearray(payload)
    for _ in range(data.draw(st.integers(0, 3))):
        bent[data.draw(st.integers(0, len(bent) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    bent = bent[: data.draw(st.integers(0, len(bent)))] if data.draw(st.booleans()) else bent
    try:
        read_NC = CODECS[name].decode(bytes(bent), scale, cases, classes)
    except CodecError:
        return
    assert read_NC.shape == (cases, classes) and np.isfinite(read_NC).all()


@pytest.mark.parametrize("name", LEVELS)
@given(tail=st.binary(min_size=1, max_size=12))
def test_nothing_can_be_hidden_behind_a_payload(name, tail):
    scale, payload = CODECS[name].encode(np.eye(6, 3, dtype=np.float32))
    said_NC = CODECS[name].decode(payload, scale, 6, 3)
    try:
        read_NC = CODECS[name].decode(payload + tail, scale, 6, 3)
    except CodecError:
        return
    assert (read_NC != said_NC).any()  # with these bytes it is another opinion, whole and well-formed


def test_levels_that_there_are_not_are_refused():
    payload = entropy.write(np.array([15, 0], dtype=np.int32), 4)
    with pytest.raises(CodecError, match="a level that int4 doesn't have"):
        CODECS["int4"].decode(payload, 1.0, 1, 3)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, 1e30])
def test_scales_out_of_range_are_refused(name, scale):
    _, payload = CODECS[name].encode(np.eye(6, 3, dtype=np.float32))
    with pytest.raises(CodecError, match="scale"):
        CODECS[name].decode(payload, scale, 6, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    payload = np.array([[bad, 0.0]], dtype="<f4").tobytes()
    with pytest.raises(CodecError, match="not finite"):
        CODECS["fp32"].decode(payload, 1.0, 1, 2)
