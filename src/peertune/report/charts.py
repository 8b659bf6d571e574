"""A line chart as HTML around an SVG plot.

The SVG holds lines only and is stretched to its box, with strokes that do not scale; every text is HTML, placed by
percent. So a chart of any width has text of one size, and needs no script to fit a phone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peertune.formatting import MINUS, NONE, THIN, count, number
from peertune.report.html import esc
from peertune.report.series import Column

SIZE = 1000  # units of the SVG in both directions
NUM_COLORS = 32
LEGEND_MAX = 8
_FRACTION = re.compile(r"\.\d+")
_DIGITS = re.compile(r"\d+")
_NUMERALS = f"0123456789.{THIN}{MINUS}"


def peer_color(peer: int) -> str:
    """A CSS colour for a peer; the palette repeats after 32."""
    return f"var(--s{peer % NUM_COLORS})"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; `style` is a class of the style sheet: "peer", "faint", "mean"."""

    name: str
    values: Column
    color: str = "var(--ink)"
    style: str = "peer"
    dots: bool = False
    listed: bool = True
    """Whether the legend and the tooltip name it."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """The range between two curves."""

    name: str
    low: Column
    high: Column


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear or logarithmic axis: data values to fractions of the plot's height or width."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def line_chart(
    x: Sequence[float],
    lines: Sequence[Line],
    *,
    y_title: str,
    x_title: str = "round",
    band: Band | None = None,
    log: bool = False,
    from_zero: bool = False,
    show: Callable[[float | None], str] = number,
    tall: bool = False,
) -> str:
    """A chart with axes, legend and hover data.

    Args:
        x: position of each point, rising.
        lines: curves with one value a point; None is a gap.
        y_title, x_title: what the axes measure, with the unit.
        band: a range drawn behind the curves.
        log: logarithmic y axis; what is not positive is a gap.
        from_zero: the y axis starts at zero.
        show: text of a y value, in ticks and tooltips.
        tall: for a chart that has the width of the page.
    Returns:
        HTML; empty where there is no value to draw.
    """
    curves = [_clean(line.values, log) for line in lines]
    edges = [_clean(band.low, log), _clean(band.high, log)] if band else []
    known = [v for values in (*curves, *edges) for v in values if v is not None]
    if not known:
        return ""
    y_axis = log_axis(min(known), max(known)) if log else linear_axis(0.0 if from_zero else min(known), max(known))
    x_axis = round_axis(x[0], x[-1])
    across = [x_axis.place(v) for v in x]
    shapes = [f'<path class="band" d="{_area(across, edges[0], edges[1], y_axis)}"/>'] if band else []
    for line, values in zip(lines, curves, strict=True):
        d = _path(across, values, y_axis)
        shapes.append(f'<path class="line {line.style}" stroke="{line.color}" d="{d}"/>')
        if line.dots or len(x) == 1:  # a line of one point is hardly to be seen
            d = "".join(f"{_point(a, y_axis.place(v))}h0" for a, v in zip(across, values, strict=True) if v is not None)
            shapes.append(f'<path class="dots {line.style}" stroke="{line.color}" d="{d}"/>')
    grid = "".join(f'<path class="grid" d="M0 {_down(y_axis.place(t)):.1f}H{SIZE}"/>' for t in y_axis.ticks)
    return (
        f'<div class="chart{" tall" if tall else ""}"><div class="y-title">{esc(y_title)}</div>'
        f'<div class="frame"><div class="y-ticks">{place_ticks(y_axis, "bottom", tick_texts(y_axis, show))}</div>'
        f'<div class="plot" data-points="{esc(_hover(x, across, lines, curves, band, edges, show), 10**9)}">'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-label="{esc(y_title)}">'
        f"{grid}{''.join(shapes)}</svg></div>"
        f'<div class="x-ticks">{place_ticks(x_axis, "left", [count(t) for t in x_axis.ticks])}</div></div>'
        f'<div class="x-title">{esc(x_title)}</div>{_legend(lines, band)}</div>'
    )


def linear_axis(low: float, high: float) -> Axis:
    """An axis over [low, high] with about five ticks at round numbers, ending at ticks."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = abs(low) * 0.1 or 1.0
        low, high = (low - pad if low else 0.0), high + pad
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(low=first * step, high=last * step, ticks=tuple(i * step for i in range(first, last + 1)))


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis over [low, high], both positive: ticks at powers of ten, or 1-2-5 where those are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    if last - first > 2:
        stride = math.ceil((last - first) / 6)
        ticks = [10.0**e for e in range(first, last + 1, stride)]
        return Axis(low=10.0**first, high=10.0**last, ticks=tuple(ticks), log=True)
    ticks = sorted(m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5) if m == 1 or e < last)
    below = max((t for t in ticks[:-1] if t <= low * 1.0001), default=ticks[0])
    above = min((t for t in ticks if t >= high * 0.9999 and t > below), default=ticks[-1])
    return Axis(low=below, high=above, ticks=tuple(t for t in ticks if below <= t <= above), log=True)


def round_axis(low: float, high: float) -> Axis:
    """An axis of rounds, from end to end; ticks at whole numbers only."""
    if high <= low:
        low, high = low - 1, low + 1
    inner = linear_axis(low, high)
    step = max(1, round(inner.ticks[1] - inner.ticks[0]))
    ticks = range(math.ceil(low / step) * step, math.floor(high) + 1, step)
    return Axis(low=low, high=high, ticks=tuple(float(t) for t in ticks if t >= 0))


def _clean(values: Column, log: bool) -> list[float | None]:
    return [None if v is None or (log and v <= 0) else v for v in values]


def _down(fraction: float) -> float:
    """SVG's y grows downwards."""
    return SIZE * (1 - fraction)


def _point(across: float, up: float, command: str = "M") -> str:
    return f"{command}{across * SIZE:.1f} {_down(up):.1f}"


def _path(across: Sequence[float], values: Column, axis: Axis) -> str:
    """A polyline with a gap at each None; a point between two gaps becomes a dot, by the round cap of its stroke."""
    parts: list[str] = []
    pen_down = False
    for i, (a, value) in enumerate(zip(across, values, strict=True)):
        if value is not None:
            parts.append(_point(a, axis.place(value), "L" if pen_down else "M"))
            alone = not pen_down and (i + 1 == len(values) or values[i + 1] is None)
            parts.append("h0" if alone else "")
        pen_down = value is not None
    return "".join(parts)


def _area(across: Sequence[float], low: Column, high: Column, axis: Axis) -> str:
    """The region between two curves, cut where either has a gap."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for a, below, above in zip(across, low, high, strict=True):
        if below is None or above is None:
            runs.append([])
        else:
            runs[-1].append((a, axis.place(below), axis.place(above)))
    parts: list[str] = []
    for run in filter(None, runs):
        outline = [(a, top) for a, _, top in run] + [(a, bottom) for a, bottom, _ in reversed(run)]
        parts += [_point(a, up, "L" if i else "M") for i, (a, up) in enumerate(outline)] + ["Z"]
    return "".join(parts)


def tick_texts(axis: Axis, show: Callable[[float | None], str]) -> list[str]:
    """Texts of the ticks without zeros that no tick needs: "1.0", "1.5", "2.0" or "1", "2", "3"."""
    shown = [_FRACTION.sub(lambda m: m[0].rstrip("0").rstrip("."), show(tick)) for tick in axis.ticks]
    units = {text.lstrip(_NUMERALS) for tick, text in zip(axis.ticks, shown, strict=True) if tick}
    if axis.log or len(units) > 1:
        return shown
    longest = max((len(m[0]) for m in map(_FRACTION.search, shown) if m), default=0)
    return [_pad(text, longest) for text in shown] if longest else shown


def place_ticks(axis: Axis, side: str, texts: Sequence[str], long: int = 4) -> str:
    """Tick texts as spans, placed by percent from `side`; at the right end those over `long` characters hang left."""
    spans = []
    for tick, text in zip(axis.ticks, texts, strict=True):
        place = axis.place(tick) * 100
        end = ' class="end"' if side == "left" and place > 97 and len(text) > long else ""
        spans.append(f'<span{end} style="{side}:{place:.2f}%">{text}</span>')
    return "".join(spans)


def _pad(text: str, length: int) -> str:
    """The number at the start of `text` with a fraction of `length` characters, the point included."""
    if (fraction := _FRACTION.search(text)) is not None:
        return text[: fraction.end()] + "0" * (length - len(fraction[0])) + text[fraction.end() :]
    digits = _DIGITS.search(text)
    return text if digits is None else f"{text[: digits.end()]}.{'0' * (length - 1)}{text[digits.end() :]}"


def _legend(lines: Sequence[Line], band: Band | None) -> str:
    entries = [
        f'<span><i class="key {line.style}" style="--c:{line.color}"></i>{esc(line.name)}</span>'
        for line in lines
        if line.listed
    ]
    if band:
        entries.append(f'<span><i class="key range"></i>{esc(band.name)}</span>')
    return f'<div class="legend">{"".join(entries)}</div>' if len(entries) > 1 else ""


def _hover(
    x: Sequence[float],
    across: Sequence[float],
    lines: Sequence[Line],
    curves: Sequence[Column],
    band: Band | None,
    edges: Sequence[Column],
    show: Callable[[float | None], str],
) -> str:
    """What the tooltip needs, as JSON: the script finds the point and prints these texts."""
    rows = [
        {"name": line.name, "color": line.color, "text": [show(v) if v is not None else NONE for v in values]}
        for line, values in zip(lines, curves, strict=True)
        if line.listed
    ]
    if band:
        texts = [f"{show(a)} to {show(b)}" for a, b in zip(edges[0], edges[1], strict=True)]
        rows.append({"name": band.name, "color": "var(--band-key)", "text": texts})
    labels = [count(v) for v in x]
    return json.dumps({"at": [round(a, 4) for a in across], "label": labels, "rows": rows}, separators=(",", ":"))
