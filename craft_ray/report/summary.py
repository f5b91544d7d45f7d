"""The comparison in numbers: how much of the old skill each arm kept and of the new one it reached, over seeds.

    old ratio = the student's old score / the teacher's
    new ratio = the student's new score / plain fine-tuning's of the same seed

Perplexities are inverted, so 1 always means "as good", and more is better. A mean is given only where every run of the
arm has the number: a mean over some of the seeds would look like a mean over all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from craft_ray.errors import ConfigError
from craft_ray.report.arms import in_order
from craft_ray.run.scoring import ratio
from craft_ray.statistics import mean_interval

Result = dict[str, Any]
"""The result.json of a run, with the `path` of its folder."""


def summarize(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Means and 95 % intervals of each arm that has a run, in the order baseline, token_ce, hidden, variants.

    Raises:
        ConfigError: an arm has two runs of one seed, or runs of different budgets.
    """
    _check_seeds(results)
    old_scores = one_old_metric(results)
    plain = {result["seed"]: result for result in results if result["arm"] == "baseline"}
    return {
        arm: _summary([result for result in results if result["arm"] == arm], plain, old_scores)
        for arm in in_order(result["arm"] for result in results)
    }


def one_old_metric(results: Sequence[Result]) -> bool:
    """Whether the old scores of these runs can be averaged. Of several skills the one that lost most represents all,
    and it may be another one in another run, which is scored by another metric."""
    return len({result["old"].get("metric") for result in results}) == 1


def new_ratio(result: Result, plain: Result | None) -> float | None:
    """A run's new score relative to plain fine-tuning's. None without either, or where plain's is zero."""
    if plain is None or result["new"]["after"] is None or plain["new"]["after"] is None:
        return None
    return ratio(result["new"]["metric"], result["new"]["after"], plain["new"]["after"])


def old_ratio(result: Result) -> float | None:
    """A run's old score relative to the teacher's. None without a score, or where the teacher's is zero."""
    return None if result["old"]["after"] is None else result["old"]["ratio"]


def _summary(runs: Sequence[Result], plain: dict[int, Result], old_scores: bool) -> dict[str, Any]:
    judged = [run["feasible"] for run in runs]
    return {
        "runs": len(runs),
        **_over_seeds("old_ratio", [old_ratio(run) for run in runs]),
        **_over_seeds("new_ratio", [new_ratio(run, plain.get(run["seed"])) for run in runs]),
        **_over_seeds("old_after", [run["old"]["after"] if old_scores else None for run in runs]),
        **_over_seeds("new_after", [run["new"]["after"] for run in runs]),
        **_over_seeds("retention_loss", [run["retention_loss"] for run in runs]),
        "epsilon": _budget(runs),
        "feasible": None if None in judged else sum(judged),
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }


def _over_seeds(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {name: None, f"{name}_interval": None}
    return {name: statistics.fmean(known), f"{name}_interval": mean_interval(known)}


def _budget(runs: Sequence[Result]) -> float | None:
    """The budget of an arm. None if it is not a single number: of several skills, which have one each, the result has
    that of the one furthest above it, and that may be another one in each run."""
    if any(run.get("skills") for run in runs):
        own = [
            {name: skill.get("epsilon") for name, skill in run["skills"].items() if "certificate" not in skill}
            for run in runs
        ]
        budgets = {run["epsilon"] for run in runs}
        if all(each == own[0] for each in own):
            return budgets.pop() if len(budgets) == 1 else None
        budgets = {str(each) for each in own}
    else:
        targets = {run["certificate"]["keep"] if "certificate" in run else None for run in runs}
        budgets = {run["epsilon"] for run in runs}
        if targets != {None} and len(targets) == 1 and None not in budgets:  # they followed the skill, each in its run
            return statistics.fmean(run["epsilon"] for run in runs)
    if len(budgets) > 1:
        raise ConfigError(
            f"the {runs[0]['arm']} runs have the budgets {_listed(budgets)}: report runs of one budget together"
        )
    epsilon: float | None = budgets.pop()
    return epsilon


def _check_seeds(results: Sequence[Result]) -> None:
    """Two runs of one seed are not independent, but an interval over them would claim that they are."""
    seen: dict[tuple[str, int], str] = {}
    for result in results:
        key = (result["arm"], result["seed"])
        if key in seen:
            raise ConfigError(
                f"{seen[key]} and {result['path']} are both {key[0]} runs of seed {key[1]}: a report takes one run for "
                f"each arm and seed"
            )
        seen[key] = result["path"]


def _listed(values: set[Any]) -> str:
    return " and ".join(sorted(str(value) for value in values))
