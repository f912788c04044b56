"""Curves as inline SVG that stretches with the page; the labels around it are text and keep their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simpletuner.helpers.reporting.html_report.markup import data_block, escape, format_number, note
from simpletuner.helpers.reporting.html_report.series import Points

WIDTH, HEIGHT = 1000, 400
# Of faint values, what lies beyond these shares is cut off: one spike must not flatten the rest.
CUT_SHARES = (0.5, 99.5)
# Values that differ by less, as a share of the largest, are one value: labels have six digits, and a running
# mean of equal numbers is off in its last bit.
LEAST_SPAN = 1e-5
# A label further to the right than this ends where its tick is, so that it does not stand out.
LAST_LABEL = 0.96


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Points
    colour: int = 1
    """Number of a colour of the style sheet."""
    is_faint: bool = False
    """Drawn behind the others, with the range of each point's steps around it."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over a common axis."""

    title: str
    curves: Sequence[Curve]
    axis: str = "step"
    note: str = ""
    is_wide: bool = False
    is_stepped: bool = False
    """Values hold until the next point."""
    from_zero: bool = False


def draw_chart(chart: Chart) -> str:
    """A figure; nothing when there are no values."""
    curves = [curve for curve in chart.curves if np.isfinite(curve.points.means).any()]
    if not curves:
        return ""
    steps = curves[0].points.steps
    left, right = float(steps[0]), float(steps[-1])
    ticks = nice_ticks(*_limits(curves, from_zero=chart.from_zero))
    low, high = ticks[0], ticks[-1]
    across = [
        tick for tick in nice_ticks(left, right, wanted=6 if chart.is_wide else 4) if left <= tick <= right
    ]
    frame = _Frame(left, right if right > left else left + 1, low, high)
    # The curve that matters most is drawn last, on top.
    paths = "".join(_paths(curve, frame, is_stepped=chart.is_stepped) for curve in curves)
    lines = "".join(f'<path class="grid" d="M0 {frame.y(tick):.1f}H{WIDTH}"/>' for tick in ticks)
    return (
        f'<figure class="chart{" wide" if chart.is_wide else ""}">\n'
        f"<figcaption><strong>{escape(chart.title)}</strong> {_legend(curves, chart.axis)}</figcaption>\n"
        f'<div class="plot" tabindex="0">{_side_labels(ticks, frame)}'
        f'<div class="field"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img">'
        f"<title>{escape(_summary(chart, curves))}</title>{lines}{paths}</svg>"
        f'<i class="cursor"></i></div>{_bottom_labels(across, frame)}</div>\n'
        f"{note(chart.note)}{data_block(_readings(curves))}\n</figure>"
    )


def nice_ticks(low: float, high: float, *, wanted: int = 4) -> list[float]:
    """Round numbers at even distances, the first at or below `low` and the last at or above `high`."""
    span, largest = high - low, max(abs(low), abs(high))
    if not LEAST_SPAN * largest < span < math.inf:
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
    """From values to places in the picture."""

    left: float
    right: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return (step - self.left) / (self.right - self.left) * WIDTH

    def y(self, value: float) -> float:
        return (self.high - value) / (self.high - self.low) * HEIGHT


def _limits(curves: Sequence[Curve], *, from_zero: bool) -> tuple[float, float]:
    """The value range of the axis: all firm curves, and faint ones without their outliers."""
    ends: list[float] = []
    for points, is_faint in ((curve.points, curve.is_faint) for curve in curves):
        for values in (points.means, points.highs) if is_faint else (points.means,):
            shares = CUT_SHARES if is_faint else (0, 100)
            ends += np.percentile(values[np.isfinite(values)], shares).tolist()
    low, high = min(ends), max(ends)
    return (0.0 if from_zero or 0 < low < 0.4 * high else low), high


def _paths(curve: Curve, frame: _Frame, *, is_stepped: bool) -> str:
    points = curve.points
    present = np.flatnonzero(np.isfinite(points.means))
    xs = [frame.x(step) for step in points.steps[present].tolist()]
    ys = [frame.y(value) for value in points.means[present].tolist()]
    css_class = "faint" if curve.is_faint else "line"
    line = f'<path class="{css_class} c{curve.colour}" d="M{_joined(xs, ys, is_stepped=is_stepped)}"/>'
    if len(xs) == 1:  # a path of one point shows nothing
        line = f'<path class="{css_class} c{curve.colour}" d="M{xs[0]:.1f} {ys[0]:.1f}h{WIDTH}"/>'
    if not curve.is_faint or not (points.highs > points.lows).any():
        return line
    top = _joined(xs, [frame.y(value) for value in points.highs[present].tolist()])
    bottom = _joined(xs[::-1], [frame.y(value) for value in points.lows[present].tolist()][::-1])
    return f'<path class="range c{curve.colour}" d="M{top}L{bottom}Z"/>{line}'


def _joined(xs: Sequence[float], ys: Sequence[float], *, is_stepped: bool = False) -> str:
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
    place = format_number(float(curves[0].points.steps[-1]))
    return (
        f'<span class="legend">{entries}<span class="key at">at {escape(axis)} <b>{place}</b></span></span>'
    )


def _last(points: Points) -> float:
    return float(points.means[np.isfinite(points.means)][-1])


def _side_labels(ticks: Sequence[float], frame: _Frame) -> str:
    spans = (f'<span style="top:{frame.y(tick) / HEIGHT:.2%}">{_short(tick)}</span>' for tick in ticks)
    # What is not placed gives the column its width.
    widest = max((_short(tick) for tick in ticks), key=len)
    return f'<div class="side"><span class="widest">{widest}</span>{"".join(spans)}</div>'


def _bottom_labels(ticks: Sequence[float], frame: _Frame) -> str:
    places = [frame.x(tick) / WIDTH for tick in ticks]
    spans = (
        f'<span{" class=end" if place > LAST_LABEL else ""} style="left:{place:.2%}">{_short(tick)}</span>'
        for tick, place in zip(ticks, places, strict=True)
    )
    return f'<div class="bottom">{"".join(spans)}</div>'


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _summary(chart: Chart, curves: Sequence[Curve]) -> str:
    ends = ", ".join(
        f"{curve.name} from {format_number(float(curve.points.means[np.isfinite(curve.points.means)][0]))} "
        f"to {format_number(_last(curve.points))}"
        for curve in curves
    )
    first, last = (format_number(float(curves[0].points.steps[place])) for place in (0, -1))
    return f"{chart.title} over {chart.axis} {first} to {last}: {ends}."


def _readings(curves: Sequence[Curve]) -> dict[str, object]:
    """What the page's script shows under the pointer."""
    return {
        "x": [_plain(step) for step in curves[0].points.steps.tolist()],
        "y": [[_plain(value) for value in curve.points.means.tolist()] for curve in curves],
    }


def _plain(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.5g}")
