"""Charts as inline SVG that scales with the page; labels are HTML text and keep their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simpletuner.helpers.reporting.html_report.markup import data_block, escape, format_number, note
from simpletuner.helpers.reporting.html_report.series import Points

WIDTH, HEIGHT = 1000, 400
# Percentiles of faint curves that set the axis: one spike must not flatten the rest.
FAINT_PERCENTILES = (0.5, 99.5)
# Values within this share of the largest are equal: labels have six digits, and the running mean of equal
# numbers is off in its last bit.
MIN_SPAN = 1e-5
# Beyond this share of the width a label is right-aligned, so that it stays inside the chart.
ALIGN_RIGHT_FROM = 0.96


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Points
    colour: int = 1
    """1 to 4, a colour of page.css."""
    is_faint: bool = False
    """Drawn behind the others, with the range of each point's steps as a band."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over a shared x axis."""

    title: str
    curves: Sequence[Curve]
    axis: str = "step"
    note: str = ""
    is_wide: bool = False
    is_stepped: bool = False
    """Each value holds until the next point."""
    from_zero: bool = False
    marks: Sequence[int] = ()
    """Steps with a vertical line, after which something was changed."""


def draw_chart(chart: Chart) -> str:
    """The chart as an HTML figure; "" if no value is finite."""
    curves = [curve for curve in chart.curves if np.isfinite(curve.points.means).any()]
    if not curves:
        return ""
    steps = curves[0].points.steps
    left, right = float(steps[0]), float(steps[-1])
    ticks = nice_ticks(*_limits(curves, from_zero=chart.from_zero))
    low, high = ticks[0], ticks[-1]
    step_ticks = [
        tick for tick in nice_ticks(left, right, wanted=6 if chart.is_wide else 4) if left <= tick <= right
    ]
    frame = _Frame(left, right if right > left else left + 1, low, high)
    # The most important curve is the last one, so it is drawn on top.
    paths = "".join(_paths(curve, frame, is_stepped=chart.is_stepped) for curve in curves)
    lines = "".join(f'<path class="grid" d="M0 {frame.y(tick):.1f}H{WIDTH}"/>' for tick in ticks)
    marks = "".join(
        f'<path class="mark" d="M{frame.x(step):.1f} 0V{HEIGHT}"/>'
        for step in chart.marks
        if left <= step <= right
    )
    return (
        f'<figure class="chart{" wide" if chart.is_wide else ""}">\n'
        f"<figcaption><strong>{escape(chart.title)}</strong> {_legend(curves, chart.axis)}</figcaption>\n"
        f'<div class="plot" tabindex="0">{_side_labels(ticks, frame)}'
        f'<div class="field"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img">'
        f"<title>{escape(_summary(chart, curves))}</title>{lines}{marks}{paths}</svg>"
        f'<i class="cursor"></i></div>{_bottom_labels(step_ticks, frame)}</div>\n'
        f"{note(chart.note)}{data_block(_pointer_values(curves))}\n</figure>"
    )


def nice_ticks(low: float, high: float, *, wanted: int = 4) -> list[float]:
    """Evenly spaced round numbers, the first at or below `low`, the last at or above `high`."""
    span, largest = high - low, max(abs(low), abs(high))
    if not MIN_SPAN * largest < span < math.inf:
        span = largest or 1.0
        low -= span / 2
        high = low + span
    power = 10.0 ** math.floor(math.log10(span / wanted))
    size = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= wanted + 0.5)
    first = math.floor(low / size + 1e-9)
    last = math.ceil(high / size - 1e-9)
    return [float(f"{index * size:.12g}") for index in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Maps values to SVG coordinates."""

    left: float
    right: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return (step - self.left) / (self.right - self.left) * WIDTH

    def y(self, value: float) -> float:
        return (self.high - value) / (self.high - self.low) * HEIGHT


def _limits(curves: Sequence[Curve], *, from_zero: bool) -> tuple[float, float]:
    """Value range of the axis: all firm curves, and faint ones without outliers."""
    ends: list[float] = []
    for points, is_faint in ((curve.points, curve.is_faint) for curve in curves):
        for values in (points.means, points.highs) if is_faint else (points.means,):
            percentiles = FAINT_PERCENTILES if is_faint else (0, 100)
            ends += np.percentile(values[np.isfinite(values)], percentiles).tolist()
    low, high = min(ends), max(ends)
    return (0.0 if from_zero or 0 < low < 0.4 * high else low), high


def _paths(curve: Curve, frame: _Frame, *, is_stepped: bool) -> str:
    points = curve.points
    present = np.flatnonzero(np.isfinite(points.means))
    xs = [frame.x(step) for step in points.steps[present].tolist()]
    ys = [frame.y(value) for value in points.means[present].tolist()]
    css_class = "faint" if curve.is_faint else "line"
    line = f'<path class="{css_class} c{curve.colour}" d="M{_path_data(xs, ys, is_stepped=is_stepped)}"/>'
    if len(xs) == 1:  # a path of one point is invisible
        line = f'<path class="{css_class} c{curve.colour}" d="M{xs[0]:.1f} {ys[0]:.1f}h{WIDTH}"/>'
    if not curve.is_faint or not (points.highs > points.lows).any():
        return line
    top = _path_data(xs, [frame.y(value) for value in points.highs[present].tolist()])
    bottom = _path_data(xs[::-1], [frame.y(value) for value in points.lows[present].tolist()][::-1])
    return f'<path class="range c{curve.colour}" d="M{top}L{bottom}Z"/>{line}'


def _path_data(xs: Sequence[float], ys: Sequence[float], *, is_stepped: bool = False) -> str:
    if is_stepped:
        rest = "".join(f"H{x:.1f}V{y:.1f}" for x, y in zip(xs[1:], ys[1:], strict=True))
        return f"{xs[0]:.1f} {ys[0]:.1f}{rest}"
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def _legend(curves: Sequence[Curve], axis: str) -> str:
    entries = "".join(
        f'<span class="key"><i class="c{curve.colour}{" faint" if curve.is_faint else ""}"></i>'
        f"{escape(curve.name)} <b>{format_number(_last(curve.points))}</b></span>"
        for curve in curves
    )
    end = format_number(float(curves[0].points.steps[-1]))
    return f'<span class="legend">{entries}<span class="key at">at {escape(axis)} <b>{end}</b></span></span>'


def _last(points: Points) -> float:
    return float(points.means[np.isfinite(points.means)][-1])


def _side_labels(ticks: Sequence[float], frame: _Frame) -> str:
    spans = (f'<span style="top:{frame.y(tick) / HEIGHT:.2%}">{_short(tick)}</span>' for tick in ticks)
    # The hidden copy of the widest label sets the width of the column.
    widest = max((_short(tick) for tick in ticks), key=len)
    return f'<div class="side"><span class="widest">{widest}</span>{"".join(spans)}</div>'


def _bottom_labels(ticks: Sequence[float], frame: _Frame) -> str:
    spans = []
    for tick in ticks:
        left = frame.x(tick) / WIDTH
        end = " class=end" if left > ALIGN_RIGHT_FROM else ""
        spans.append(f'<span{end} style="left:{left:.2%}">{_short(tick)}</span>')
    return f'<div class="bottom">{"".join(spans)}</div>'


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _summary(chart: Chart, curves: Sequence[Curve]) -> str:
    ends = ", ".join(
        f"{curve.name} from {format_number(float(curve.points.means[np.isfinite(curve.points.means)][0]))} "
        f"to {format_number(_last(curve.points))}"
        for curve in curves
    )
    first, last = (format_number(float(curves[0].points.steps[index])) for index in (0, -1))
    return f"{chart.title} over {chart.axis} {first} to {last}: {ends}."


def _pointer_values(curves: Sequence[Curve]) -> dict[str, object]:
    """The values that page.js shows under the pointer."""
    return {
        "x": [_json_number(step) for step in curves[0].points.steps.tolist()],
        "y": [[_json_number(value) for value in curve.points.means.tolist()] for curve in curves],
    }


def _json_number(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.5g}")
