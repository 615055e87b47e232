"""What people read errs on the side that is claimed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.rounding import at_least, at_most, rounded_up


@given(value=st.floats(0, allow_nan=False), digits=st.integers(1, 8))
def test_what_is_printed_is_never_on_the_wrong_side_of_the_truth_nor_far_from_it(value, digits):
    above, below = (write(value, digits).replace(",", "") for write in (at_most, at_least))
    if math.isinf(value):
        assert above == below == "∞"
        return
    assert float(below) <= value <= float(above)
    assert float(above) <= value * (1 + 10.0 ** (1 - digits)) + 5e-324
    assert float(below) >= value * (1 - 10.0 ** (1 - digits)) - 5e-324


@pytest.mark.parametrize(
    ("value", "above", "below"),
    [
        (0.1, "0.1000", "0.1000"),
        (0.98761, "0.9877", "0.9876"),
        (0.0, "0", "0"),
        (12345.6, "12,350", "12,340"),
    ],
)
def test_digits(value, above, below):
    assert (at_most(value), at_least(value)) == (above, below)


@given(value=st.floats(1e-300, 1e300))
def test_rounding_up_goes_up_by_a_thousandth_at_most(value):
    assert value <= rounded_up(value) <= value * 1.0011
