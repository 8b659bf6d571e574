"""Curves made fit for a page: columns of per-peer values, averaged over bins of rounds and smoothed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

Column = Sequence[float | None]

MAX_POINTS = 400
SMOOTH_FROM = 120
"""Shorter curves are drawn as they are."""


def columns(rows: Sequence[Column]) -> list[list[float | None]]:
    """Per-round rows of N values as N columns; a row that is too short has None for the rest."""
    width = max((len(row) for row in rows), default=0)
    return [[row[i] if i < len(row) else None for row in rows] for i in range(width)]


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def across(curves: Sequence[Column], reduce: Callable[[list[float]], float | None]) -> list[float | None]:
    """One curve of many: `reduce` of the values known at each point."""
    points = ([v for v in point if v is not None] for point in zip(*curves, strict=True))
    return [reduce(known) if known else None for known in points]


def bin_size(length: int, max_points: int = MAX_POINTS) -> int:
    """Rounds a point stands for, so that a curve of `length` rounds has at most `max_points`."""
    return max(1, math.ceil(length / max_points))


def downsample(values: Column, size: int) -> list[float | None]:
    """Means over bins of `size` values."""
    return list(values) if size == 1 else [mean(values[i : i + size]) for i in range(0, len(values), size)]


def window_of(length: int) -> int:
    """Width of the centred moving average for a curve of `length` points: odd; 1 leaves it as it is."""
    return 1 if length < SMOOTH_FROM else 2 * (length // 80) + 1


def smooth(values: Column, window: int) -> list[float | None]:
    """Centred moving average over `window` points, narrower at the ends; a gap stays a gap."""
    if window == 1:
        return list(values)
    half, size = window // 2, len(values)
    smoothed: list[float | None] = []
    for i, value in enumerate(values):
        reach = min(half, i, size - 1 - i)
        smoothed.append(None if value is None else mean(values[i - reach : i + reach + 1]))
    return smoothed
