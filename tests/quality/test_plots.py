"""Charts are SVG that says what it was given."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from distrifusion.quality.plots import Line, Mark, chart

BOLD = "bold"


def points(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.get("points", "").split())]
        for line in ElementTree.fromstring(svg).iter("polyline")
    ]


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("text")]


def test_a_line_goes_up_where_its_values_do() -> None:
    ((a, b, c),) = points(chart([Line([1.0, 2.0, 4.0], BOLD, "a line")], "step", "error"))
    assert a[0] < b[0] < c[0] and a[1] > b[1] > c[1]
    assert (a[1] - b[1]) * 2 == pytest.approx(b[1] - c[1], abs=0.3)


def test_a_logarithmic_axis_has_powers_of_ten() -> None:
    svg = chart([Line([1e-7, 1e-5, 1e-3], BOLD, "")], "step", "error", log=True)
    ((a, b, c),) = points(svg)
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.3)
    assert {"10⁻⁷", "10⁻³", "step", "error"} <= set(texts(svg))


def test_what_cannot_be_drawn_is_a_gap() -> None:
    svg = chart([Line([1.0, 2.0, math.inf, math.nan, 3.0, 0.0, 4.0, 5.0], BOLD, "")], "x", "y", log=True)
    assert [len(piece) for piece in points(svg)] == [2, 1, 2]
    assert chart([Line([0.0, 0.0], BOLD, "")], "x", "y", log=True) == ""
    assert chart([Line([], BOLD, "")], "x", "y") == ""


@pytest.mark.parametrize("values", [[0.0, 0.0, 1.0], [5.0], [3.0, 3.0], [-2.0, 7.0], [1e-12, 2e-12], [1e6, 3e6]])
@pytest.mark.parametrize("log", [False, True])
def test_any_range_stays_inside(values: list[float], log: bool) -> None:
    svg = chart([Line(values, BOLD, "")], "x", "y", log=log)
    for x, y in (point for line in points(svg) for point in line):
        assert 0 <= x <= 720 and 0 <= y <= 300


def test_marks_labels_and_signs_of_markup() -> None:
    lines = [Line([1.0, 2.0], "dashed", "<title>", label="a & b")]
    svg = chart(lines, "x <1>", 'the "y"', marks=[Mark(2, "warm-up")])
    assert {"a & b", "x <1>", 'the "y"', "warm-up"} <= set(texts(svg))
    assert re.search(r'<line class="mark" x1="704\.0"', svg)
