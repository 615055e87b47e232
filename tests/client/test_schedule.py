"""Releases leave on the beat, and what they tell by their time is how many beats they took."""

from hypothesis import given
from hypothesis import strategies as st

from client.schedule import departure

MOMENTS = st.floats(0, 1e6)


@given(began=MOMENTS, one=st.floats(0, 30), other=st.floats(0, 30))
def test_tasks_that_take_different_times_leave_at_the_same_moment(began, one, other):
    assert departure(began, began + one, 31.0) == departure(began, began + other, 31.0) == began + 31.0


@given(began=MOMENTS, took=st.floats(0, 1e4), beat=st.floats(0.1, 1e3))
def test_nothing_leaves_before_it_is_ready_and_nothing_waits_longer_than_a_beat(began, took, beat):
    leaves = departure(began, began + took, beat)
    assert leaves >= began + took - 1e-6 * (1 + began)
    assert leaves <= began + max(took, 0) + beat * (1 + 1e-6) + 1e-6 * (1 + began)


@given(began=MOMENTS, took=st.floats(0, 1e4))
def test_without_a_beat_a_release_leaves_at_once(began, took):
    assert departure(began, began + took, 0.0) == began + took
