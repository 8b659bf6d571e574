"""Differences between contestants, in pairs over the seeds they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from scipy import stats

LEVEL = 0.95
TIE = 1e-9
"""Differences this small are the arithmetic's."""


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; None for one seed."""
    if len(values) < 2:
        return None
    center = mean(values)
    return math.sqrt(sum((v - center) ** 2 for v in values) / (len(values) - 1))


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Confidence interval of the mean difference: dbar +- t_{(1+LEVEL)/2, n-1} s / sqrt(n), Student's.

    Args:
        differences: one a seed.
    Returns:
        Its ends; None where there is no spread to judge by: for one seed, or where all differences are one.
    """
    deviation = spread(differences)
    if deviation is None or deviation < TIE:
        return None
    n = len(differences)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    center = mean(differences)
    return center - half, center + half


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two contestants."""

    one: str
    other: str
    difference: float
    """Mean over seeds of one's quality minus the other's."""
    interval: tuple[float, float] | None
    num_seeds: int

    @property
    def is_tie(self) -> bool:
        """Whether both are equal, on average over the seeds."""
        return abs(self.difference) < TIE

    @property
    def is_clear(self) -> bool:
        """Whether the difference is larger than the seed noise: zero lies outside the interval."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def pairs(qualities: dict[str, list[float]]) -> list[Pair]:
    """Every two contestants, in their order.

    Args:
        qualities: by contestant, one value a seed, the seeds in one order for all.
    """
    found = []
    for (one, a), (other, b) in combinations(qualities.items(), 2):
        differences = [x - y for x, y in zip(a, b, strict=True)]
        interval = paired_interval(differences)
        pair = Pair(one=one, other=other, difference=mean(differences), interval=interval, num_seeds=len(differences))
        found.append(pair)
    return found
