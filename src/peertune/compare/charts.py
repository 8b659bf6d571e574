"""Charts whose curves have points of their own: quality over samples, bytes or memory, and the spread of peers.

They look like the run report's charts and share its style sheet and script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peertune.formatting import NONE, middle
from peertune.metric import Metric
from peertune.report.charts import SIZE, Axis, linear_axis, place_ticks, tick_texts
from peertune.report.html import esc

Show = Callable[[float | None], str]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One point of a curve, with its range over seeds."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One contestant; `color` is CSS."""

    name: str
    color: str
    marks: Sequence[Mark]


def memory_axis(low: float, high: float) -> Axis:
    """An axis of bytes with its ticks at round numbers of the unit that `formatting.memory` writes the highest in."""
    unit = 1024.0 ** max(0, math.floor(math.log(max(high, 1.0), 1024)))
    axis = linear_axis(low / unit, high / unit)
    return Axis(low=axis.low * unit, high=axis.high * unit, ticks=tuple(tick * unit for tick in axis.ticks))


def curve_chart(
    curves: Sequence[Curve],
    metric: Metric,
    x_title: str,
    show_x: Show,
    x_axis: Callable[[float, float], Axis] = linear_axis,
) -> str:
    """Lines through each curve's points, a bar at each point over its range; x starts at zero.

    Args:
        metric: what y is.
        x_axis: makes the axis from its ends.
    Returns:
        HTML.
    """
    y_title, show_y = metric.axis_title, metric.show
    marks = [mark for curve in curves for mark in curve.marks]
    across = x_axis(0.0, max(m.x for m in marks))
    y_axis = linear_axis(min(m.low for m in marks), max(m.high for m in marks))
    grid = "".join(f'<path class="grid" d="M0 {_down(y_axis, t):.1f}H{SIZE}"/>' for t in y_axis.ticks)
    shapes = "".join(_shape(curve, across, y_axis) for curve in curves)
    legend = "".join(
        f'<span><i class="key mean" style="--c:{curve.color}"></i>{esc(middle(curve.name, 80))}</span>'
        for curve in curves
    )
    return (
        f'<div class="chart"><div class="y-title">{esc(y_title)}</div><div class="frame">'
        f'<div class="y-ticks">{place_ticks(y_axis, "bottom", tick_texts(y_axis, show_y))}</div>'
        f'<div class="plot" data-points="{esc(_hover(curves, across, show_x, show_y), 10**9)}">'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-label="{esc(y_title)}">'
        f"{grid}{shapes}</svg></div>"
        f'<div class="x-ticks">{place_ticks(across, "left", tick_texts(across, show_x))}</div></div>'
        f'<div class="x-title">{esc(x_title)}</div><div class="legend">{legend}</div></div>'
    )


def spread_strip(values: Sequence[float], result: float, axis: Axis, color: str, tip: str) -> str:
    """Peers' values as dots on a line from the lowest to the highest; a tall tick is what the contestant ends with."""
    places = [axis.place(value) * SIZE for value in values]
    end = axis.place(result) * SIZE
    dots = "".join(f"M{place:.1f} 10h0" for place in places)
    return (
        f'<svg class="peers" data-tip="{esc(tip)}" viewBox="0 0 {SIZE} 20" preserveAspectRatio="none">'
        f'<path class="range" d="M{min(places):.1f} 10H{max(places):.1f}"/>'
        f'<path class="result" d="M{end:.1f} 2V18"/><path class="each" stroke="{color}" d="{dots}"/></svg>'
    )


def _shape(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    places = [(x_axis.place(m.x) * SIZE, m) for m in curve.marks]
    line = " ".join(f"{'L' if i else 'M'}{x:.1f} {_down(y_axis, m.y):.1f}" for i, (x, m) in enumerate(places))
    bars = "".join(f"M{x:.1f} {_down(y_axis, m.low):.1f}V{_down(y_axis, m.high):.1f}" for x, m in places)
    dots = "".join(f"M{x:.1f} {_down(y_axis, m.y):.1f}h0" for x, m in places)
    return (
        f'<path class="line peer" stroke="{curve.color}" stroke-opacity="0.45" d="{bars}"/>'
        f'<path class="line mean" stroke="{curve.color}" d="{line}"/>'
        f'<path class="dots" stroke="{curve.color}" d="{dots}"/>'
    )


def _down(axis: Axis, value: float) -> float:
    return SIZE * (1 - axis.place(value))


def _hover(curves: Sequence[Curve], axis: Axis, show_x: Show, show_y: Show) -> str:
    """What the tooltip needs: every x that some curve has, and the values of the curves that have it."""
    every = sorted({mark.x for curve in curves for mark in curve.marks})
    rows = []
    for curve in curves:
        at = {mark.x: mark for mark in curve.marks}
        texts = [_range(at[x], show_y) if x in at else NONE for x in every]
        rows.append({"name": curve.name, "color": curve.color, "text": texts})
    data = {"at": [round(axis.place(x), 4) for x in every], "label": [show_x(x) for x in every], "rows": rows}
    return json.dumps(data, separators=(",", ":"))


def _range(mark: Mark, show: Show) -> str:
    return show(mark.y) if mark.low == mark.high else f"{show(mark.y)} ({show(mark.low)} to {show(mark.high)})"
