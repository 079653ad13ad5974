from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.cli.curve import curve_svg, smooth
from weft.pages import Line, chart, ticks

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=60))
def test_a_curve_is_well_formed_and_inside_its_frame(losses):
    root = ElementTree.fromstring(curve_svg(losses, 'a <task> & "more"', "x < y"))
    width, height = float(root.get("width")), float(root.get("height"))
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 2
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        assert len(points) == len(losses)
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_lines_have_names_beside_the_plot_and_may_be_drawn_by_logarithms():
    lines = [Line([(0.0, 1.0), (1.0, 0.1)], "a & b"), Line([(0.5, 0.01)], "c")]
    root = ElementTree.fromstring(chart(lines, "t", "s", "seconds", "loss", log=True))
    words = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {"a & b", "c", "seconds", "0.1", "1"} <= set(words)
    drawn = [e.get("points").split() for e in root.iter() if e.tag.endswith("polyline")]
    heights = [float(pair.split(",")[1]) for points in drawn for pair in points]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.02)
    with pytest.raises(ValueError, match="above 0"):
        chart([Line([(0.0, 0.0)])], "t", log=True)


@pytest.mark.parametrize("losses", [[], [math.nan], [1.0, math.inf]])
def test_nothing_to_draw(losses):
    with pytest.raises(ValueError, match="finite"):
        curve_svg(losses, "x")


@given(finite, finite)
def test_ticks_are_few_and_inside(a, b):
    low, high = sorted((a, b))
    found = ticks(low, high)
    margin = (high - low) * 1e-6 + 1e-9
    assert all(low - margin <= tick <= high + margin for tick in found)
    assert len(found) <= 12


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=50))
def test_the_average_stays_between_the_extremes(values):
    for index, average in enumerate(smooth(values)):
        seen = values[: index + 1]
        assert min(seen) - 1e-9 <= average <= max(seen) + 1e-9
