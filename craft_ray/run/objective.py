"""An objective: one metric to maximise or minimise, within bounds on others. A sweep ranks its settings by it, and a
run its checkpoints.

A tuner ranks by one number, and a setting that breaks a bound must not win. So the number combines both:

    score = 1/2 + f(x) / 2 in (0, 1)    within all bounds, f(x) = x / (1 + |x|), x the metric (negated to minimise)
    score = -sum of violations < 0      otherwise

Every setting within the bounds is above every other one; among the former the metric decides, and among the latter the
size of the violation, relative to the bound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.config import BOUND, EvalSet, Experiment, ObjectiveConfig, scores_of
from craft_ray.errors import ConfigError, DataError
from craft_ray.run.held_out import eval_sets, key_of
from craft_ray.run.metrics import FIELDS, Record
from craft_ray.run.scoring import HIGHER_IS_BETTER
from craft_ray.statistics import mean_bound

SCORES = ("old/score", "old/ratio", "new/score", "new/ratio")
HELDOUT = ("heldout/retention_loss", "heldout/violation")
LOSSES = ("train/loss", "craft/retention_loss", "perf/step_s", "perf/data_s")
STEPS = (*FIELDS, "train/lr", "craft/epsilon", "perf/step_s", "perf/data_s")


@dataclass(frozen=True)
class Verdict:
    """How a setting compares with an objective."""

    value: float
    """The metric's mean over seeds."""
    reached: dict[str, float]
    """For each bounded metric, what is compared with it: the value, or over seeds the mean's confidence bound."""
    violations: dict[str, float]
    """For each bound, relative to its size; 0 where it is kept."""
    score: float
    """The one number that orders settings; more is better."""

    @property
    def violation(self) -> float:
        return math.fsum(self.violations.values())

    @property
    def feasible(self) -> bool:
        return self.violation == 0


def judge(objective: ObjectiveConfig, runs: Sequence[Mapping[str, Any]], key: str = "objective") -> Verdict:
    """The verdict on a setting from the metrics of its runs, one for each seed.

    Args:
        key: where the objective is in the config, for errors.

    Raises:
        DataError: a metric of the objective has no value.
    """
    value = statistics.mean(_values(objective.metric, runs, key))
    reached, violations = {}, {}
    for metric, bound in objective.subject_to.items():
        least, limit = parse_bound(bound)
        reached[metric] = mean_bound(_values(metric, runs, key), objective.confidence, lower=least)
        missing = limit - reached[metric] if least else reached[metric] - limit
        violations[metric] = max(0.0, missing) / (abs(limit) or 1.0)
    total = math.fsum(violations.values())
    x = -value if objective.maximize is None else value
    score = -total if total else (1 + x / (1 + abs(x))) / 2
    return Verdict(value, reached, violations, score)


def parse_bound(text: str) -> tuple[bool, float]:
    """`>= 0.95` as (True, 0.95): whether it is a lower bound, and the limit."""
    match = BOUND.fullmatch(text)
    assert match is not None, "checked by the config"
    return match[1] == ">=", float(match[2])


def objective_of(config: Experiment) -> ObjectiveConfig:
    """The objective, checked against what the config measures.

    Raises:
        ConfigError: there is none, or it names a metric that is not measured, or it would search for the worst.
    """
    objective = config.objective
    if objective is None:
        raise ConfigError(
            "the config has no objective: add e.g. 'objective: {maximize: new/score, subject_to: {old/ratio: \">= "
            "0.95\"}}'"
        )
    check_objective(objective, config, "objective")
    return objective


def check_objective(objective: ObjectiveConfig, config: Experiment, key: str, of_steps: bool = True) -> None:
    """Check an objective against what the config measures.

    Args:
        key: where it is in the config, for errors.
        of_steps: whether the means of steps can be judged, or only what a validation measures.

    Raises:
        ConfigError: it names a metric that is not measured, or it would search for the worst.
    """
    for metric in (objective.metric, *objective.subject_to):
        _check_measured(metric, config, key, STEPS if of_steps else ())
    wanted = [(objective.metric, objective.maximize is not None)]
    wanted += [(metric, parse_bound(bound)[0]) for metric, bound in objective.subject_to.items()]
    for metric, more in wanted:
        better = more_is_better(metric, config)
        if better is not None and better is not more:
            raise ConfigError(f"{key}: {_wrong_way(metric, better)}")


def more_is_better(metric: str, config: Experiment) -> bool | None:
    """Whether a higher value of a metric is better; None if that depends on its use."""
    skill, number = split(metric)
    if is_score(metric):
        return number == "ratio" or HIGHER_IS_BETTER[eval_set_of(config, skill).metric]
    return False if metric in (*HELDOUT, *LOSSES) or number in ("retention_loss", "violation") else None


def split(metric: str) -> tuple[str, str]:
    """The skill and what is measured of it: `old` and `ratio`, or of one of several skills its name (`drawer` and
    `ratio` for skills/drawer/ratio)."""
    *skill, number = metric.split("/")
    return skill[-1] if skill else "", number


def is_score(metric: str) -> bool:
    return metric in SCORES or (metric.startswith("skills/") and metric.endswith(("/score", "/ratio")))


def _wrong_way(metric: str, better: bool) -> str:
    if better:
        return f"higher {metric} is better: maximize it, or bound it with >="
    if is_score(metric):
        return (
            f"{metric} is a perplexity, where lower is better: minimize it, bound it with <=, or use "
            f"{metric.rpartition('/')[0]}/ratio, where higher is better"
        )
    return f"lower {metric} is better: minimize it, or bound it with <="


def means(records: Iterable[Record]) -> Record:
    """The mean of each metric over the steps that have a value."""
    columns: dict[str, list[float]] = {metric: [] for metric in STEPS}
    for record in records:
        for metric, values in columns.items():
            if record.get(metric) is not None:  # runs of earlier versions lack some
                values.append(float(record[metric]))
    return {metric: statistics.fmean(values) for metric, values in columns.items() if values}


def _check_measured(metric: str, config: Experiment, key: str, steps: Sequence[str]) -> None:
    skills = skill_metrics(config)
    if is_score(metric) and (metric in SCORES or metric in skills):
        eval_set_of(config, split(metric)[0], key)
    elif metric in HELDOUT or metric in skills:
        if config.craft.anchor_cache_dir is None:
            raise ConfigError(f"{key}: {metric} needs anchors: set craft.anchor_cache_dir")
    elif metric not in steps:
        where = "" if steps else " in validations"
        raise ConfigError(
            f"{key}: '{metric}' is not measured{where}: choose among {', '.join((*SCORES, *HELDOUT, *skills, *steps))}"
        )


def skill_metrics(config: Experiment) -> list[str]:
    """The metrics of each of several old skills."""
    kinds = ("score", "ratio", "retention_loss", "violation")
    return [f"{scores_of(skill)}/{kind}" for skill in config.skills for kind in kinds]


def eval_set_of(config: Experiment, skill: str, key: str = "objective") -> EvalSet:
    """How a skill is scored in validations. Of several old skills, `old` is the one that has kept the least; they are
    scored alike.

    Raises:
        ConfigError: it is not scored, or `old` stands for skills that are scored by different metrics.
    """
    sets = dict(eval_sets(config, "validation"))
    if skill == "old" and config.skills:
        named = [sets[name] for name in config.skills if name in sets]
        if len({found.metric for found in named}) > 1:
            raise ConfigError(
                f"{key}: old/score would compare scores of several metrics, as the skills are scored by different "
                f"ones: use old/ratio"
            )
        if named:
            return named[0]
    if skill not in sets:
        raise ConfigError(f"{key}: a score of the {skill} skill needs data: add {key_of(config, 'validation', skill)}")
    return sets[skill]


def _values(metric: str, runs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    values = [run.get(metric) for run in runs]
    if any(value is None for value in values):
        reason = "the teacher's own score is 0" if metric.endswith("/ratio") else "it was not measured in these steps"
        raise DataError(f"{key}: {metric} has no value ({reason})")
    numbers = [float(value) for value in values if value is not None]
    if not all(math.isfinite(number) for number in numbers):
        raise DataError(f"{key}: {metric} is {numbers[0] if len(numbers) == 1 else numbers}: it must be finite")
    return numbers
