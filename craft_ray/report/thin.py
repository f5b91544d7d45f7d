"""A long curve as a few hundred points, without hiding its extremes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """A curve over steps. Where it was thinned, a point is the mean of its bin, and low and high are the extremes."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bin_size: int
    """Values per point; 1 where nothing was thinned."""


def curve(steps: Sequence[int], values: Sequence[float | None], most: int = MOST_POINTS) -> Curve:
    """The points that have a value, at most `most` of them."""
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    x, y = (np.array([pair[i] for pair in known], dtype=float) for i in (0, 1))
    size = max(1, -(-len(x) // most))
    starts = range(0, len(x), size)
    bins = [y[start : start + size] for start in starts]
    return Curve(
        np.array([x[start : start + size].mean() for start in starts]),
        np.array([part.mean() for part in bins]),
        np.array([part.min() for part in bins]),
        np.array([part.max() for part in bins]),
        size,
    )
