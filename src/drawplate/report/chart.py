"""A line chart as inline SVG, without script or library: axes with round ticks, lines, marks, a description.

The `<svg>` is exactly the plotting area. Text and marks are placed in percent of it and lines in a nested, stretched
coordinate system of SPAN x SPAN, so the chart fills any width while its letters and strokes keep their size: it reads
on a phone and in print. Tick labels hang outside the area; the style sheet leaves the room and sets overflow visible.
Left out: logarithmic axes, tooltips, anything that hides a point. Colours and dashes are classes in report.css.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from drawplate.report.visible import shorten, visible

SPAN = 1000
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve. `style` is its CSS class; `marks` draws a dot per point and writes out the first and last value."""

    name: str
    style: str
    points: tuple[Point, ...]
    marks: bool = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line, such as a prediction."""

    name: str
    style: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Band:
    """A named stretch of the x axis, such as a phase; `shaded` sets it off from its neighbours."""

    name: str
    shaded: bool
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn. Points that are not finite numbers are gaps in the line, never zeros."""

    key: str
    title: str
    description: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    bands: tuple[Band, ...] = ()
    y_from_zero: bool = False
    whole_x: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values, its round ticks, and where a value lies on it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float

    def share(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)

    def label(self, value: float) -> str:
        """A tick's text, with as many decimals as the tick distance needs."""
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        if abs(self.step * 10**decimals - round(self.step * 10**decimals)) > 1e-6:
            decimals += 1
        return f"{value:,.{decimals}f}"


def round_step(extent: float, wanted: int, whole: bool = False) -> float:
    """The distance 1, 2, 2.5 or 5 times a power of ten that gives at most `wanted` intervals in `extent`."""
    rough = extent / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    choices = [factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9)]
    step = choices[0]
    if whole and step != round(step):
        return max(1.0, next((choice for choice in choices if choice == round(choice)), 1.0))
    return step


def value_axis(values: Iterable[float], from_zero: bool = False, wanted: int = 5) -> Axis:
    """An axis that starts and ends on a tick and holds all values."""
    low, high = _extent(values, from_zero)
    step = round_step(high - low, wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(first * step, last * step, tuple(n * step for n in range(first, last + 1)), step)


def running_axis(values: Iterable[float], whole: bool = False, wanted: int = 6) -> Axis:
    """An axis from zero to the last value exactly, with ticks inside: for steps and time."""
    high = max((v for v in values if math.isfinite(v)), default=1.0)
    high = high if high > 0 else 1.0
    step = round_step(high, wanted, whole)
    return Axis(0.0, high, tuple(n * step for n in range(math.floor(high / step + 1e-9) + 1)), step)


def _extent(values: Iterable[float], from_zero: bool) -> Point:
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = (0.0 if from_zero else min(finite)), max(finite)
    if high - low <= 1e-9 * max(1.0, abs(high)):
        room = abs(high) * 0.1 if abs(high) > 1e-9 else 1.0
        return (0.0 if from_zero else low - room), high + room
    return low, high


def chart_axes(chart: Chart) -> tuple[Axis, Axis]:
    """The x and the y axis that hold every series, level and band."""
    points = [point for series in chart.series for point in series.points if math.isfinite(point[1])]
    x_values = [x for x, _ in points] + [band.end for band in chart.bands]
    y_values = [y for _, y in points] + [level.value for level in chart.levels]
    return running_axis(x_values, chart.whole_x), value_axis(y_values, chart.y_from_zero)


def render_svg(chart: Chart) -> Markup:
    """The chart as one `<svg>` element; its title and description are what a screen reader says."""
    x, y = chart_axes(chart)
    parts = [_bands(chart, x), _grid(x, y)]
    parts += [_level(level, y) for level in chart.levels]
    parts += [_line(series, x, y) for series in chart.series]
    parts += [_marks(series, x, y) for series in chart.series if series.marks]
    labels = _fill('<text class="axis-title" x="100%" y="100%" dy="38" text-anchor="end">{}</text>', chart.x_label)
    labels += _fill('<text class="axis-title" x="0" y="0" dx="-40" dy="-18">{}</text>', chart.y_label)
    head = _fill(
        '<svg class="plot" role="img" aria-labelledby="{0}-title {0}-desc"><title id="{0}-title">{1}</title>'
        '<desc id="{0}-desc">{2}</desc>',
        chart.key,
        chart.title,
        chart.description,
    )
    return head + Markup("").join(parts) + labels + Markup("</svg>")


def swatch(style: str, marks: bool = False) -> Markup:
    """The legend's sample of a line."""
    dot = _fill('<circle class="{}" cx="14" cy="6" r="3.5"/>', style) if marks else Markup("")
    line = _fill('<line class="{}" x1="0" x2="28" y1="6" y2="6"/>', style)
    return Markup('<svg class="swatch" width="28" height="12" aria-hidden="true">') + line + dot + Markup("</svg>")


def _fill(template: str, *values: object) -> Markup:
    return Markup(template).format(*(visible(value) for value in values))


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


def _grid(x: Axis, y: Axis) -> Markup:
    across = (
        '<line class="grid-line" x1="0" x2="100%" y1="{0}" y2="{0}"/><text class="tick y-tick" x="0" y="{0}" dx="-8" '
    )
    across += 'dy="0.32em" text-anchor="end">{1}</text>'
    down = '<text class="tick x-tick" x="{0}" y="100%" dy="18" text-anchor="middle">{1}</text>'
    rows = [_fill(across, _percent(1 - y.share(tick)), y.label(tick)) for tick in y.ticks]
    columns = [_fill(down, _percent(x.share(tick)), x.label(tick)) for tick in x.ticks]
    base = Markup('<line class="baseline" x1="0" x2="100%" y1="100%" y2="100%"/>')
    return Markup("").join([*rows, base, *columns])


def _bands(chart: Chart, x: Axis) -> Markup:
    parts = []
    for band in chart.bands:
        start, width = x.share(band.start), x.share(band.end) - x.share(band.start)
        box = '<rect class="band{}" x="{}" y="0" width="{}" height="100%"><title>{}</title></rect>'
        parts.append(_fill(box, " shaded" if band.shaded else "", _percent(start), _percent(width), band.name))
        if width >= 0.16:  # narrower, the name would run into its neighbour's on a phone
            name = '<text class="band-name" x="{}" y="100%" dx="6" dy="-8">{}</text>'
            parts.append(_fill(name, _percent(start), shorten(visible(band.name), 16)))
    return Markup("").join(parts)


def _level(level: Level, y: Axis) -> Markup:
    line = '<line class="{}" x1="0" x2="100%" y1="{}" y2="{}"><title>{}</title></line>'
    at = _percent(1 - y.share(level.value))
    return _fill(line, level.style, at, at, level.name)


def _line(series: Series, x: Axis, y: Axis) -> Markup:
    runs: list[list[Point]] = [[]]
    for px, py in series.points:
        if math.isfinite(py):
            runs[-1].append((x.share(px) * SPAN, (1 - y.share(py)) * SPAN))
        elif runs[-1]:
            runs.append([])
    lines = [
        _fill('<polyline class="{}" points="{}"/>', series.style, " ".join(f"{px:.2f},{py:.2f}" for px, py in run))
        for run in runs
        if len(run) > 1
    ]
    alone = [(run[0][0] / SPAN, run[0][1] / SPAN) for run in runs if len(run) == 1 and not series.marks]
    dots = [_dot(series.style, px, py, 2.5, series.name) for px, py in alone]
    frame = f'<svg viewBox="0 0 {SPAN} {SPAN}" preserveAspectRatio="none" width="100%" height="100%">'
    return Markup(frame) + Markup("").join(lines) + Markup("</svg>") + Markup("").join(dots)


def _dot(style: str, x_share: float, y_share: float, radius: float, title: str) -> Markup:
    dot = '<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>'
    return _fill(dot, style, _percent(x_share), _percent(y_share), radius, title)


def _marks(series: Series, x: Axis, y: Axis) -> Markup:
    finite = [(px, py) for px, py in series.points if math.isfinite(py)]
    crowded = len(finite) > 40
    dots = [
        _dot(series.style, x.share(px), 1 - y.share(py), 2 if crowded else 4, f"{series.name}: {py:.4f} at {px:g}")
        for px, py in finite
    ]
    ends = (
        [(finite[0], "start", 10), (finite[-1], "end", -10)] if len(finite) > 1 else [(p, "start", 10) for p in finite]
    )
    text = '<text class="value {}" x="{}" y="{}" dx="{}" dy="{}" text-anchor="{}">{}</text>'
    names = []
    for (px, py), anchor, dx in ends:
        dy = -9 if y.share(py) < 0.9 else 4  # level with the mark where above would reach the axis title
        place = _percent(x.share(px)), _percent(1 - y.share(py))
        names.append(_fill(text, series.style, *place, dx, dy, anchor, f"{py:.2f}"))
    return Markup("").join([*dots, *names])
