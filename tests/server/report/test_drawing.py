"""Labels beside a plot can all be read."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.report.drawing import Label, canvas, label_right

DISTANCE = 0.07


@given(heights=st.lists(st.floats(0, 100), min_size=1, max_size=14))
def test_labels_stand_apart_within_the_picture_and_in_the_order_of_their_heights(heights):
    _, axes = canvas(height=4.0, left=0.1, right=0.6)
    axes.set_ylim(0, 100)
    label_right(axes, [Label(str(place), height, "black") for place, height in enumerate(heights)], DISTANCE)
    stand = {text.get_text(): text.get_position()[1] for text in axes.texts}
    places = [stand[str(place)] for place in sorted(range(len(heights)), key=lambda place: heights[place])]
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in places)
    assert all(upper - lower >= 100 * DISTANCE - 1e-9 for lower, upper in pairwise(places))
