"""95 % intervals of a part of independent trials, such as the episodes that ended with success.

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),   P(|Z| < z) = 0.95 for Z ~ N(0, 1)

The score interval of E. B. Wilson, Probable inference, the law of succession, and statistical inference, J. Am. Stat.
Assoc. 22 (1927): it stays within 0 and 1 and has a width where none or all succeed, however few the trials are.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from craft_ray.report.student_t import LEVEL

Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


def wilson(part: float, trials: int) -> list[float]:
    """[low, high] around the part of `trials` that succeeded."""
    assert 0 <= part <= 1
    assert trials > 0
    middle = part + Z**2 / (2 * trials)
    half = Z * math.sqrt(part * (1 - part) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    return [max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)]
