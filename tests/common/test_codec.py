"""Codecs: what is decoded is what was meant, and hostile bytes raise `CodecError` and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from common.codec import CODECS, LARGEST_LOGIT, CodecError, centred

logits = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12),
    elements=st.floats(-1e6, 1e6, width=32),
)


@pytest.mark.parametrize("name", CODECS)
@given(logits_NC=logits)
def test_decoding_gives_the_centred_logits_within_one_step(name, logits_NC):
    codec = CODECS[name]
    scale, payload = codec.encode(logits_NC)
    read_NC = codec.decode(payload, scale, *logits_NC.shape)
    meant_NC = np.clip(centred(logits_NC), -LARGEST_LOGIT, LARGEST_LOGIT)
    largest = np.abs(meant_NC).max()
    tolerance = {"int8": 0.51 * largest / 127, "fp16": 1e-3 * largest + 1e-6, "fp32": 0.0}[name]
    smallest = np.finfo(
        np.float32
    ).tiny  # the scale is a float32: below its normal numbers it has no precision
    assert np.abs(read_NC - meant_NC).max() <= tolerance + 1e-6 * largest + smallest


@pytest.mark.parametrize("name", CODECS)
@given(logits_NC=logits)
def test_the_length_depends_on_the_shape_alone(name, logits_NC):
    codec = CODECS[name]
    assert (
        len(codec.encode(logits_NC)[1])
        == len(codec.encode(np.zeros_like(logits_NC))[1])
        == logits_NC.size * codec.itemsize
    )


@pytest.mark.parametrize("name", CODECS)
@given(
    payload=st.binary(max_size=64),
    scale=st.floats(width=32),
    cases=st.integers(1, 8),
    classes=st.integers(2, 8),
)
def test_hostile_bytes_decode_to_finite_values_or_are_refused(name, payload, scale, cases, classes):
    try:
        read_NC = CODECS[name].decode(payload, scale, cases, classes)
    except CodecError:
        return
    assert read_NC.shape == (cases, classes)
    assert np.isfinite(read_NC).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    payload = np.array([[bad, 0.0]], dtype="<f4").tobytes()
    with pytest.raises(CodecError, match="not finite"):
        CODECS["fp32"].decode(payload, 1.0, 1, 2)
