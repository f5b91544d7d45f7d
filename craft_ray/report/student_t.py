"""95 % intervals of a mean by Student's t, for any number of runs.

    mean +- t s / sqrt(n),   P(|T| < t) = 0.95 for T with n - 1 degrees of freedom

P is a finite sum for whole degrees of freedom (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and
26.7.4), so no table ends and no statistics package is needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95


def interval(values: Sequence[float]) -> list[float] | None:
    """[low, high] around the mean, not clipped to what is possible. None for one value: it tells no spread."""
    if len(values) < 2:
        return None
    half = quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return [mean - half, mean + half]


def quantile(freedom: int, level: float = LEVEL) -> float:
    """The t with P(|T| < t) = level."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _probability(theta: float, freedom: int) -> float:
    """P(|T| < t), where t = sqrt(freedom) tan(theta)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
