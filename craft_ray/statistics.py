"""Intervals and bounds: Student's t for a mean over seeds, Wilson's score for a rate.

Probabilities of Student's t are finite sums for whole degrees of freedom, so neither a table nor a statistics package
is needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95
"""Confidence of the two-sided intervals."""
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""P(|N| < Z) = LEVEL for a standard normal N."""
CONFIDENCE = 0.95
"""Confidence of the one-sided bounds that a certificate states."""


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """[low, high] around the mean, not clipped to what is possible. None for a single value, which has no spread.

    mean -+ t s / sqrt(n),   P(|T| < t) = 0.95 for T with n - 1 degrees of freedom

    W. S. Gosset ("Student"), The probable error of a mean, Biometrika 6 (1908).
    """
    if len(values) < 2:
        return None
    half, mean = _half_width(values, LEVEL), statistics.fmean(values)
    return [mean - half, mean + half]


def mean_bound(values: Sequence[float], confidence: float, lower: bool) -> float:
    """One-sided bound of the mean at a confidence above 1/2; for a single value, the value itself.

    mean -+ t s / sqrt(n),   P(T < t) = confidence for T with n - 1 degrees of freedom
    """
    mean = statistics.mean(values)  # exact: seeds that are all at a limit keep it
    if len(values) == 1:
        return mean
    half = _half_width(values, 2 * confidence - 1)
    return mean - half if lower else mean + half


def rate_interval(rate: float, trials: int) -> list[float]:
    """[low, high] around the success rate of independent trials, such as episodes.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),   P(|Z| < z) = 0.95 for Z ~ N(0, 1)

    The score interval of E. B. Wilson, Probable inference, the law of succession, and statistical inference, J. Am.
    Stat. Assoc. 22 (1927): it stays between 0 and 1, and it has a width even where none or all of a few trials succeed.
    """
    assert 0 <= rate <= 1
    assert trials > 0
    middle = rate + Z**2 / (2 * trials)
    half = Z * math.sqrt(rate * (1 - rate) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    return [max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)]


def rate_upper_bound(events: int, trials: int, confidence: float) -> float:
    """One-sided upper bound of a rate: the p with P(X <= events) = 1 - confidence for X ~ Binomial(trials, p).

    C. J. Clopper and E. S. Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial,
    Biometrika 26 (1934): it is exact, and never too small.
    """
    assert 0 <= events <= trials
    if events == trials:
        return 1.0
    choose = [math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in range(events + 1)]
    low, high = events / trials, 1.0
    for _ in range(50):
        p = (low + high) / 2
        terms = (c + k * math.log(p) + (trials - k) * math.log1p(-p) for k, c in enumerate(choose))
        low, high = (p, high) if math.fsum(map(math.exp, terms)) > 1 - confidence else (low, p)
    return high


def paired_change_bounds(lost: int, gained: int, trials: int, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bound of the change of a success rate between two passes over the same trials.

    d -+ z sqrt(b + c - n d^2) / n,   d = (c - b)/n,   b = lost + 1/2, c = gained + 1/2, n = trials + 2

    A. Agresti and Y. Min, Simple improved confidence intervals for comparing matched proportions, Statistics in
    Medicine 24 (2005). The half counts give a width where no trial, or each, has changed.

    Args:
        lost, gained: trials that succeeded only in the first, or only in the second pass.
    """
    assert 0 <= lost + gained <= trials
    return _paired_bounds(gained - lost, gained + lost, trials, confidence)


def paired_mean_change_bounds(changes: Sequence[float], confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bound of the mean change of scores from 0 to 1 between two passes over the same trials.

    d -+ z sqrt(q + 1 - n d^2) / n,   d = sum(changes)/n,   q = sum(changes^2), n = trials + 2

    For changes of -1, 0 and 1 it is the bound of Agresti and Min; the two extra trials, of which half has lost all and
    half has gained all, give a width where no score has changed.
    """
    assert all(-1 <= change <= 1 for change in changes)
    squares = math.fsum(change * change for change in changes)
    return _paired_bounds(math.fsum(changes), squares, len(changes), confidence)


def _paired_bounds(total: float, squares: float, trials: int, confidence: float) -> tuple[float, float]:
    n = trials + 2
    change = total / n
    half = normal_quantile(confidence) * math.sqrt(squares + 1 - n * change**2) / n
    return max(-1.0, change - half), min(1.0, change + half)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided P of a split at least as uneven as `lost` against `gained`, for independent trials that each went
    either way with equal chance.

    min(1, 2 sum_{k <= min(lost, gained)} C(n, k) / 2^n),   n = lost + gained

    Q. McNemar, Note on the sampling error of the difference between correlated proportions or percentages,
    Psychometrika 12 (1947); exact by the binomial, so it also holds for a few trials.

    Args:
        lost, gained: trials that succeeded only in the first, or only in the second pass.
    """
    n = lost + gained
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n)


def ratio_of_sums_bounds(tops: Sequence[float], bottoms: Sequence[float], confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bound of R = sum(tops) / sum(bottoms) over independent pairs, by the delta method:

    R -+ z sqrt(n/(n-1) sum (top - R bottom)^2) / sum(bottoms)
    """
    n, total = len(tops), math.fsum(bottoms)
    value = math.fsum(tops) / total
    if n < 2:
        return -math.inf, math.inf
    rest = math.fsum((top - value * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    half = normal_quantile(confidence) * math.sqrt(rest * n / (n - 1)) / total
    return value - half, value + half


def normal_quantile(confidence: float) -> float:
    """The z with P(Z < z) = confidence for Z ~ N(0, 1)."""
    return NormalDist().inv_cdf(confidence)


def t_quantile(freedom: int, level: float) -> float:
    """The t with P(|T| < t) = level for T with `freedom` degrees of freedom, by bisection of the angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _half_width(values: Sequence[float], level: float) -> float:
    return t_quantile(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))


def _probability(theta: float, freedom: int) -> float:
    """P(|T| < t), where t = sqrt(freedom) tan(theta): M. Abramowitz and I. A. Stegun, Handbook of Mathematical
    Functions (1964), 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
