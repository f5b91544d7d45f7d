"""A sweep in words: its metrics by name and unit, and its outcome."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.config import Experiment, ObjectiveConfig
from craft_ray.report.wording import NONE, number, percent
from craft_ray.run.objective import eval_set_of, is_score, parse_bound, split
from craft_ray.run.scoring import HIGHER_IS_BETTER
from craft_ray.sweep.results import SweepResult, TrialResult
from craft_ray.sweep.trials import Report

PROSE = {
    "exact_match": "exact match",
    "contains": "contained answers",
    "numeric": "correct numbers",
    "regex": "patterns found",
    "rouge_l": "ROUGE-L",
    "function": "the own metric",
    "choice": "correct choices",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "lm_eval": "harness tasks",
    "success": "success rate",
}
HELDOUT = {
    "heldout/retention_loss": "retention loss on held-out anchors",
    "heldout/violation": "violation of the budget on held-out anchors",
}


@dataclass(frozen=True)
class Metric:
    """A metric of the reports as a reader sees it."""

    key: str
    label: str
    percent: bool
    higher: bool
    """Whether more is better."""
    least: float | None = None
    """The bound from below, `>=`."""
    most: float | None = None
    """The bound from above, `<=`."""

    @property
    def limit(self) -> float | None:
        return self.most if self.least is None else self.least

    @property
    def named(self) -> str:
        """The label, with the config's key."""
        return self.key if self.label == self.key else f"{self.label} ({self.key})"

    @property
    def bound(self) -> str:
        """The bound as an inequality; empty where there is none."""
        return "" if self.limit is None else f"{'≥' if self.least is not None else '≤'} {self.form(self.limit)}"

    def form(self, value: float | None) -> str:
        return percent(value) if self.percent else number(value)

    def of(self, report: Report | None) -> float | None:
        """The number in a report; None if it is missing or not finite."""
        value = None if report is None else report["metrics"].get(self.key)
        return value if value is not None and math.isfinite(value) else None


def objective_in(config: Experiment) -> ObjectiveConfig:
    """The objective of a config that a sweep was started with."""
    assert config.objective is not None, "a sweep does not start without one"
    return config.objective


def metric_of(config: Experiment, key: str) -> Metric:
    """A metric as the objective wants it, whether it is part of the objective or not."""
    objective = objective_in(config)
    bound = objective.subject_to.get(key)
    least, limit = (True, None) if bound is None else parse_bound(bound)
    label, as_percent, higher = _described(config, key)
    if key == objective.metric:
        higher = objective.maximize is not None
    elif bound is not None:
        higher = least
    return Metric(key, label, as_percent, higher, limit if least else None, None if least else limit)


def metrics_of(config: Experiment) -> list[Metric]:
    """The objective's metric, then those that are bounded."""
    objective = objective_in(config)
    return [metric_of(config, key) for key in dict.fromkeys((objective.metric, *objective.subject_to))]


def _described(config: Experiment, key: str) -> tuple[str, bool, bool]:
    """The label, whether it is a fraction of one, and whether more is better."""
    if not is_score(key):
        return HELDOUT.get(key, key), False, False
    skill, kind = split(key)
    scored = eval_set_of(config, skill)
    higher = HIGHER_IS_BETTER[scored.metric]
    if kind == "score":
        return f"{PROSE[scored.metric]} on the {skill} skill", higher, higher
    inverse = "" if higher else " (inverse perplexity)"
    return f"{skill} skill relative to the teacher's{inverse}", True, True


def shown(value: Any) -> str:
    """The value of a knob as a person would write it."""
    if type(value) in (int, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def knob_value(trial: TrialResult, knob: str) -> str:
    return shown(trial.params[knob]) if knob in trial.params else NONE


def short_names(knobs: Sequence[str]) -> dict[str, str]:
    """Knobs by the last part of their keys, where it is unique."""
    ends = {knob: knob.rpartition(".")[2] for knob in knobs}
    often = Counter(ends.values())
    return {knob: end if often[end] == 1 else knob for knob, end in ends.items()}


def headline(result: SweepResult) -> list[str]:
    """What was searched for and what was found, in sentences."""
    return [_searched(metrics_of(result.plan.config)), *_found(result)]


def numbers_in(result: SweepResult, report: Report | None) -> str:
    """The numbers of a report."""
    parts = (f"{metric.label} {metric.form(metric.of(report))}" for metric in metrics_of(result.plan.config))
    return ", ".join(parts)


def tooltip(result: SweepResult, trial: TrialResult) -> str:
    """A trial in a few lines."""
    return "\n".join(
        [
            f"trial {trial.number}, {status(trial)}",
            numbers_in(result, trial.last),
            *(f"{name} {shown(value)}" for name, value in trial.params.items()),
        ]
    )


def status(trial: TrialResult) -> str:
    if trial.outcome.status == "stopped" and trial.last is not None:
        return f"stopped early at step {trial.last['step']}"
    return trial.outcome.status


def violation(report: Report) -> float:
    """The sum over all bounds, each relative to its size."""
    return math.fsum(report["violations"].values())


def shortfalls(result: SweepResult, report: Report) -> list[str]:
    """By how much each broken bound was missed."""
    return [
        _shortfall(metric, objective_in(result.plan.config).confidence, report)
        for metric in metrics_of(result.plan.config)
        if report["violations"].get(metric.key)
    ]


def _shortfall(metric: Metric, confidence: float, report: Report) -> str:
    limit, seeds = metric.limit, report["seeds"]
    assert limit is not None
    missing = report["violations"][metric.key] * (abs(limit) or 1.0)
    amount = f"{number(100 * missing)} percentage points" if metric.percent else number(missing)
    reached = metric.form(metric.of(report))
    if seeds == 1:
        return f"{metric.label} is {reached} and misses {metric.bound} by {amount}"
    held = metric.form(limit - missing if metric.least is not None else limit + missing)
    return (
        f"{metric.label} is {reached} in the mean of {seeds} seeds, and its {100 * confidence:g} % confidence bound, "
        f"{held}, misses {metric.bound} by {amount}"
    )


def _searched(metrics: Sequence[Metric]) -> str:
    goal, bounds = metrics[0], [metric for metric in metrics if metric.limit is not None]
    extreme = "highest" if goal.higher else "lowest"
    within = " and ".join(f"{metric.named} {metric.bound}" for metric in bounds)
    return f"Searched for the {extreme} {goal.named}{', with ' + within if within else ', without bounds'}."


def _found(result: SweepResult) -> list[str]:
    best = result.best
    if best is None:
        return _unfinished(result)
    assert best.last is not None, "a trial that finished has reported its end"
    if best.feasible:
        return [f"Trial {best.number} is best: {numbers_in(result, best.last)}."]
    return [
        f"NO finished trial is within the bounds. The least violating is trial {best.number}: "
        f"{numbers_in(result, best.last)}.",
        *(f"Its {words}." for words in shortfalls(result, best.last)),
    ]


def _unfinished(result: SweepResult) -> list[str]:
    if not result.trials:
        return ["No trial has started."]
    failed = [trial for trial in result.trials if trial.outcome.status == "failed"]
    if len(failed) == len(result.trials):
        count = "The only trial" if len(failed) == 1 else f"All {len(failed)} trials"
        return [f"{count} failed. Trial {failed[0].number}: {failed[0].outcome.reason or 'no reason was recorded'}"]
    reporting = [(trial, trial.last) for trial in result.trials if trial.last is not None]
    if not reporting:
        return ["No trial has finished, and none has reported a number."]
    furthest, last = max(reporting, key=lambda pair: (pair[1]["step"], pair[1]["score"]))
    return [
        f"No trial has finished, so none is ranked. The one that got furthest is trial {furthest.number}, "
        f"{status(furthest)}: {numbers_in(result, last)}."
    ]
