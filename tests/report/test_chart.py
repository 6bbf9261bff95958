from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from drawplate.report.chart import SPAN, Chart, Level, Series, chart_axes, render_svg, running_axis, value_axis

POINTS = ((0.0, 10.0), (50.0, 20.0), (100.0, 15.0))


def make_chart(points: tuple[tuple[float, float], ...] = POINTS, marks: bool = False) -> Chart:
    series = Series(name="loss", style="line-a", points=points, marks=marks)
    return Chart(key="k", title="T", description="D", x_label="step", y_label="nats", series=(series,))


def parse(chart: Chart) -> etree._Element:
    return etree.fromstring(str(render_svg(chart)))


def percent(text: str | None) -> float:
    assert text is not None
    assert text.endswith("%")
    return float(text[:-1]) / 100


def tick_at(svg: etree._Element, kind: str, label: str, coordinate: str) -> float:
    """Where the axis says that `label` is, as a share of the width or height."""
    found = [t for t in svg.iter("text") if t.get("class") == f"tick {kind}" and t.text == label]
    assert len(found) == 1
    return percent(found[0].get(coordinate))


def line_points(svg: etree._Element) -> list[tuple[float, float]]:
    pairs = [pair.split(",") for line in svg.iter("polyline") for pair in line.get("points").split()]
    return [(float(x) / SPAN, float(y) / SPAN) for x, y in pairs]


def test_a_point_is_drawn_where_the_axes_say_its_values_are() -> None:
    svg = parse(make_chart())
    drawn = line_points(svg)
    for (x_label, y_label), (x, y) in zip((("0", "10"), ("20", "20")), (drawn[0], drawn[1]), strict=True):
        assert y == pytest.approx(tick_at(svg, "y-tick", y_label, "y"), abs=1e-4)
        if x_label == "0":
            assert x == pytest.approx(tick_at(svg, "x-tick", x_label, "x"), abs=1e-4)
    assert drawn[2][0] == pytest.approx(tick_at(svg, "x-tick", "100", "x"), abs=1e-4)


def test_larger_values_are_higher_and_later_ones_further_right() -> None:
    first, second, third = line_points(parse(make_chart()))
    assert second[1] < third[1] < first[1]
    assert first[0] < second[0] < third[0]


def test_marks_lie_on_their_line() -> None:
    svg = parse(make_chart(marks=True))
    circles = [(percent(c.get("cx")), percent(c.get("cy"))) for c in svg.iter("circle")]
    assert circles == [pytest.approx(point, abs=1e-4) for point in line_points(svg)]


def test_a_level_lies_at_its_value_and_inside_the_axis() -> None:
    chart = dataclasses.replace(make_chart(), levels=(Level(name="predicted", style="level-b", value=40.0),))
    svg = parse(chart)
    level = next(line for line in svg.iter("line") if line.get("class") == "level-b")
    assert percent(level.get("y1")) == pytest.approx(tick_at(svg, "y-tick", "40", "y"), abs=1e-4)


def test_what_is_not_a_number_is_a_gap() -> None:
    svg = parse(make_chart(((0, 1), (1, 2), (2, math.nan), (3, 2), (4, math.inf), (5, 1), (6, 3))))
    assert [len(line.get("points").split()) for line in svg.iter("polyline")] == [2, 2]
    assert len(list(svg.iter("circle"))) == 1  # step 3 stands alone between two gaps


@pytest.mark.parametrize("points", [(), ((0, math.nan),), ((0, 0),), ((1, 5.0),), ((0, 3.0), (10, 3.0))])
def test_no_or_one_or_equal_values_still_make_a_chart(points: tuple[tuple[float, float], ...]) -> None:
    svg = parse(make_chart(points, marks=True))
    assert "nan" not in etree.tostring(svg).decode()


def test_a_screen_reader_is_told_title_and_description() -> None:
    svg = parse(make_chart())
    ids = svg.get("aria-labelledby").split()
    assert [svg.find(f".//*[@id='{i}']").text for i in ids] == ["T", "D"]
    assert svg.get("role") == "img"


def test_names_are_escaped() -> None:
    chart = dataclasses.replace(make_chart(), title="<script>alert(1)</script>", y_label="</text><b>")
    assert "<script" not in render_svg(chart)
    assert "<b>" not in render_svg(chart)


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=20))
def test_every_value_lies_between_the_first_and_the_last_tick(values: list[float]) -> None:
    axis = value_axis(values)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.ticks[0] - slack <= min(values)
    assert max(values) <= axis.ticks[-1] + slack
    assert 2 <= len(axis.ticks) <= 8
    assert len({axis.label(tick) for tick in axis.ticks}) == len(axis.ticks)


@given(st.integers(1, 10**7))
def test_steps_have_whole_and_distinct_ticks(steps: int) -> None:
    axis = running_axis([float(steps)], whole=True)
    assert axis.high == steps
    assert all(tick == round(tick) <= steps for tick in axis.ticks)
    assert len({axis.label(tick) for tick in axis.ticks}) == len(axis.ticks) <= 8


def test_ticks_are_round() -> None:
    x, y = chart_axes(make_chart(((0, 2.06), (171, 3.17))))
    assert [y.label(tick) for tick in y.ticks] == ["2.00", "2.25", "2.50", "2.75", "3.00", "3.25"]
    assert [x.label(tick) for tick in x.ticks] == ["0", "50", "100", "150"]
    assert value_axis([-12.1, 0.0]).label(-2.5) == "-2.5", "the step is 2.5"
