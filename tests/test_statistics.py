"""Intervals and bounds against printed tables, calculation by hand, and SciPy (which comes with scikit-learn)."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from scipy import stats

from craft_ray.statistics import Z, mean_bound, mean_interval, rate_interval, rate_upper_bound, t_quantile

T_95 = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 10: 1.833, 31: 1.697}
"""One-sided 95 % quantiles of Student's t by the number of values, from the tables."""


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (30, 2.0423), (101, 1.9837)]
)
def test_quantiles_equal_those_of_printed_tables(freedom: int, t: float) -> None:
    assert t_quantile(freedom, 0.95) == pytest.approx(t, abs=5e-5)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.8, 0.95, 0.99, 0.9999])
def test_quantiles_equal_those_of_scipy(level: float) -> None:
    for freedom in (*range(1, 12), 30, 31, 999, 1000):
        assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9), freedom


def test_interval_by_hand() -> None:
    # mean 2, standard deviation 1, t = 4.302653 for 2 degrees of freedom: 2 -+ 4.302653 / sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx([2 - 2.484138, 2 + 2.484138], abs=1e-6)
    assert mean_interval([0.99, 1.0, 1.0]) == pytest.approx([0.982324, 1.011010], abs=2e-6), "it is not clipped"
    assert mean_interval([0.5]) is None


@pytest.mark.parametrize("count", [2, 3, 10, 50])
def test_intervals_and_bounds_of_the_mean_are_those_of_scipy(count: int) -> None:
    rng = random.Random(count)
    values = [rng.gauss(0.9, 0.05) for _ in range(count)]
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(count)
    assert mean_interval(values) == pytest.approx(list(stats.t.interval(0.95, count - 1, mean, error)), rel=1e-9)
    low = stats.t.ppf(0.1, count - 1, mean, error)
    assert mean_bound(values, 0.9, lower=True) == pytest.approx(low, rel=1e-9)
    assert mean_bound(values, 0.9, lower=False) == pytest.approx(2 * mean - low, rel=1e-9)


@pytest.mark.parametrize("count", T_95)
def test_the_bound_of_the_mean_has_the_quantiles_of_the_textbook(count: int) -> None:
    rng = random.Random(count)
    values = [rng.gauss(0.9, 0.05) for _ in range(count)]
    half = T_95[count] * statistics.stdev(values) / math.sqrt(count)
    mean = statistics.fmean(values)
    assert mean_bound(values, 0.95, lower=True) == pytest.approx(mean - half, abs=1e-4)
    assert mean_bound(values, 0.95, lower=False) == pytest.approx(mean + half, abs=1e-4)


@pytest.mark.parametrize(("confidence", "t"), [(0.9, 1.886), (0.975, 4.303), (0.99, 6.965)])
def test_the_level_of_confidence_counts(confidence: float, t: float) -> None:
    assert mean_bound([0.0, 1.0, 2.0], confidence, lower=True) == pytest.approx(1 - t / math.sqrt(3), abs=1e-3)


def test_one_value_is_its_own_bound_and_equal_ones_are_too() -> None:
    for values in ([0.7], [0.7, 0.7, 0.7]):
        assert mean_bound(values, 0.95, lower=True) == 0.7
        assert mean_bound(values, 0.95, lower=False) == 0.7


def test_interval_of_a_rate_by_hand() -> None:
    # z = 1.959964, z^2 = 3.841459; 8 of 10: (0.8 + 0.192073 -+ 1.959964 sqrt(0.016 + 0.0096036)) / 1.384146
    assert pytest.approx(1.959964, abs=1e-6) == Z
    assert rate_interval(0.8, 10) == pytest.approx([0.490162, 0.943318], abs=1e-6)
    assert rate_interval(0.0, 20) == pytest.approx([0.0, 3.841459 / 23.841459], abs=1e-6)
    assert rate_interval(1.0, 20) == pytest.approx([20 / 23.841459, 1.0], abs=1e-6)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (3, 7), (50, 50), (199, 200)])
def test_intervals_of_rates_are_those_of_scipy(successes: int, trials: int) -> None:
    known = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert rate_interval(successes / trials, trials) == pytest.approx([known.low, known.high], abs=1e-9)


@pytest.mark.parametrize(("events", "trials"), [(0, 20), (11, 220), (3, 7), (199, 200), (5, 5)])
def test_upper_bounds_of_rates_are_those_of_scipy(events: int, trials: int) -> None:
    known = stats.binomtest(events, trials, alternative="less").proportion_ci(0.95, method="exact")
    assert rate_upper_bound(events, trials, 0.95) == pytest.approx(known.high, abs=1e-9)


def test_209_answers_of_220_that_agree_lose_at_most_eight_points() -> None:
    assert 0.08 <= rate_upper_bound(220 - 209, 220, 0.95) < 0.0825
