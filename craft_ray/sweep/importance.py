"""How strongly each knob is associated with each metric of the objective, over the trials of a sweep.

What is compared. All trials that reported at one validation: the latest that at least half of the trials with a
report, and at least MINIMUM of them, have reached. Metrics of different validations are never mixed, so that a trial
that was stopped early does not count as a bad one. A knob with a condition is compared over the trials that have it.

What is computed. Values become ranks, and equal values share their mean rank: a sweep has few trials, and ranks need
neither a straight line nor the scale of a knob. The share is the adjusted R^2 of a least-squares fit to the metric's
ranks, from 0 (nothing) to 1 (the knob fixes the order of the trials):

    share = max(0, 1 - (1 - R^2) (n - 1) / (n - p))

    numbers    R^2 = rho^2, the correlation of the ranks of knob and metric, squared;       p = 2
    choices    R^2 = eta^2, sum over groups of n_g (mean_g - mean)^2 / sum (r - mean)^2;    p = number of groups

Without the adjustment, chance alone would give a knob 1 / (n - 1), and a choice among k values (k - 1) / (n - 1). For
choices, this is epsilon^2.

What chance does. `chance` is the share that one in twenty random pairings of the same values exceeds: with six trials
it is not the mean of a share that misleads, but its spread. A share that does not exceed it says little.

It is an association, not a cause, and covers one knob at a time: a best value in the middle of a range is not seen (the
ranks go up and down again), nor are knobs that matter together; a scheduler that stops trials, or a sampler that
learns, makes knobs correlate with one another.

    rho        Spearman, 1904, "The proof and measurement of association between two things"
    eta^2      Fisher, 1925, "Statistical Methods for Research Workers"; of ranks: Kruskal and Wallis, 1952, "Use of
               ranks in one-criterion variance analysis"
    epsilon^2  Kelley, 1935, "An unbiased correlation ratio measure"
    p = 2      Ezekiel, 1930, "Methods of Correlation Analysis": the same adjustment for a line
    chance     Pitman, 1937, "Significance tests which may be applied to samples from any populations"
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from craft_ray.sweep.results import SweepResult
from craft_ray.sweep.space import Distribution, Params
from craft_ray.sweep.trials import Report

MINIMUM = 4
"""Trials below which nothing is computed."""
PAIRINGS = 2000
CHANCE = 0.95


@dataclass(frozen=True)
class Association:
    """How strongly a knob is associated with a metric."""

    trials: int
    """Trials that have both."""
    share: float | None
    """From 0 to 1; None if it cannot be computed."""
    chance: float | None
    """What one in twenty random pairings of the same values exceeds; None if `share` is."""
    reason: str | None = None
    """Why there is no share."""


@dataclass(frozen=True)
class Importance:
    """The associations of all knobs, by knob and metric."""

    step: int
    """The step of the validation, over all seeds."""
    trials: int
    """Trials that reported at this step."""
    of: dict[str, dict[str, Association]]


def importance(result: SweepResult, metrics: Sequence[str]) -> Importance | None:
    """The association of each knob with each of `metrics`. None if no validation was reached by enough trials."""
    step = common_step(result)
    if step is None:
        return None
    reports = [report for trial in result.trials for report in trial.reports if report["step"] == step]
    return Importance(
        step,
        len(reports),
        {
            knob: {metric: _of_reports(knob, cases, metric, reports) for metric in metrics}
            for knob, cases in result.plan.space.knobs.items()
        },
    )


def common_step(result: SweepResult) -> int | None:
    """The latest step at which half of the trials that reported at all, and no fewer than MINIMUM, did so."""
    reporting = sum(bool(trial.reports) for trial in result.trials)
    counts = Counter(step for trial in result.trials for step in {report["step"] for report in trial.reports})
    enough = max(MINIMUM, reporting / 2)
    return max((step for step, count in counts.items() if count >= enough), default=None)


def is_numeric(cases: Sequence[Distribution]) -> bool:
    """Whether all values of a knob are numbers, which have an order."""
    return all(type(option) in (int, float) for case in cases for option in case.options)


def association(values: Sequence[Any], metric: Sequence[float], numeric: bool) -> Association:
    """How strongly the `values` of a knob are associated with those of a metric, trial by trial."""
    n = len(values)
    if n < MINIMUM:
        return Association(n, None, None, "too few trials")
    ranks = ranked(metric)
    if np.ptp(ranks) == 0:
        return Association(n, None, None, "the metric is the same in all")
    design = _line(values) if numeric else _groups(values)
    p = design.shape[1] + 1
    if p == 1:
        return Association(n, None, None, "the value is the same in all")
    if p >= n:
        return Association(n, None, None, "each trial has a different value")
    rng = np.random.default_rng(0)
    pairings = np.stack([ranks, *(rng.permutation(ranks) for _ in range(PAIRINGS))])
    shares = _shares(pairings, design, p)
    return Association(n, float(shares[0]), float(np.quantile(shares[1:], CHANCE)))


def ranked(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _of_reports(knob: str, cases: Sequence[Distribution], metric: str, reports: Sequence[Report]) -> Association:
    known = [(_params(report)[knob], report["metrics"][metric]) for report in reports if _has(report, knob, metric)]
    return association([value for value, _ in known], [number for _, number in known], is_numeric(cases))


def _params(report: Report) -> Params:
    """The setting at the time: population based training changes it during training."""
    params: Params = report["params"]
    return params


def _has(report: Report, knob: str, metric: str) -> bool:
    value = report["metrics"].get(metric)
    return knob in _params(report) and value is not None and math.isfinite(value)


def _line(values: Sequence[float]) -> np.ndarray:
    """The ranks of numbers as one column of length 1 and mean 0; no column if they do not differ."""
    centred = ranked(values) - (len(values) + 1) / 2
    length = np.linalg.norm(centred)
    return (centred / length)[:, None] if length else np.empty((len(values), 0))


def _groups(values: Sequence[Any]) -> np.ndarray:
    """An orthonormal basis, without the constant, of what is constant within each group."""
    names = [json.dumps(value) for value in values]
    columns = [np.ones(len(names)), *(np.array([name == each for name in names]) for each in sorted(set(names))[1:])]
    return np.linalg.qr(np.stack(columns, axis=1).astype(float))[0][:, 1:]


def _shares(pairings: np.ndarray, design: np.ndarray, p: int) -> np.ndarray:
    """The adjusted R^2, not below 0, of each row of ranks on an orthonormal design of mean 0."""
    n = pairings.shape[1]
    centred = pairings - pairings.mean(axis=1, keepdims=True)
    explained = ((centred @ design) ** 2).sum(axis=1) / (centred**2).sum(axis=1)
    return np.clip(1 - (1 - explained) * (n - 1) / (n - p), 0.0, 1.0)
