"""The report of a sweep: a self-contained `report.html`."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from typing import Any

import yaml

from craft_ray.config import dump_config
from craft_ray.report.page import template
from craft_ray.storage.files import write_atomically
from craft_ray.sweep import wording
from craft_ray.sweep.curves import progress_plot, retention_curves, retention_plots
from craft_ray.sweep.importance import MINIMUM, importance
from craft_ray.sweep.parallel import parallel_plot
from craft_ray.sweep.plots import importance_plot, pareto_metrics, pareto_plot
from craft_ray.sweep.results import SweepResult, TrialResult
from craft_ray.sweep.trials import SweepFolder

SAMPLERS = {"random": "random", "tpe": "tree-structured Parzen estimator (tpe)"}
SCHEDULERS = {
    "asha": "successive halving (asha)",
    "median": "median stopping",
    "pbt": "population based training (pbt)",
    "none": "none, every trial runs to completion",
}
ORDER = {"finished": 0, "stopped": 1, "open": 2, "failed": 3}


@dataclass(frozen=True)
class Row:
    """A trial in the table."""

    trial: TrialResult
    rank: int | None
    numbers: list[str]
    """Values of the objective's metrics."""
    violation: float | None
    knobs: list[str]


def write_sweep_report(result: SweepResult, folder: SweepFolder, command: str) -> None:
    """Write `report.html` into the folder of a sweep, whatever happened to its trials.

    Args:
        command: what wrote this report; shown if it is not the command that started the sweep.

    Raises:
        StorageError: the file could not be written.
    """
    page = template("sweep.html.j2").render(
        title=f"Sweep {result.plan.config.name}",
        result=result,
        headline=wording.headline(result),
        settings=_settings(result),
        facts=_facts(result),
        **plots(result),
        **_table(result),
        **_reproduction(result, folder, command),
    )
    write_atomically(folder.path / "report.html", page)


def table_rows(result: SweepResult) -> list[Row]:
    """All trials: those that finished by rank, then the stopped ones by steps reached and score, the failed ones
    last."""
    rank = {trial.number: position for position, trial in enumerate(result.ranking, 1)}
    metrics = wording.metrics_of(result.plan.config)

    def order(trial: TrialResult) -> tuple[float, ...]:
        reached = (0.0, 0.0) if trial.last is None else (-trial.last["step"], -trial.last["score"])
        return (ORDER[trial.outcome.status], rank.get(trial.number, 0), *reached, trial.number)

    return [
        Row(
            trial,
            rank.get(trial.number),
            [metric.form(metric.of(trial.last)) for metric in metrics],
            None if trial.last is None else wording.violation(trial.last),
            [wording.knob_value(trial, knob) for knob in result.plan.space.knobs],
        )
        for trial in sorted(result.trials, key=order)
    ]


def _settings(result: SweepResult) -> list[tuple[str, str]]:
    """The setting of the best trial."""
    best = result.best
    return [] if best is None else [(knob, wording.shown(value)) for knob, value in best.params.items()]


def _facts(result: SweepResult) -> list[tuple[str, str]]:
    sweep = result.plan.config.sweep
    count = Counter(trial.outcome.status for trial in result.trials)
    within = sum(trial.feasible is True for trial in result.ranking)
    seconds = sum(trial.last["seconds"] for trial in result.trials if trial.last is not None)
    trials = f"{count['finished']} finished, {count['stopped']} stopped early, {count['failed']} failed"
    trials += f", {count['open']} still open" if count["open"] else ""
    facts = [("Trials", trials)]
    if wording.objective_in(result.plan.config).subject_to:
        facts.append(("Within the bounds", f"{within} of {count['finished']} finished"))
    facts += [
        ("Seeds per setting", str(sweep.repeat)),
        ("Time", f"{seconds:.0f} s summed over all trials, also those that ran in parallel"),
        ("Sampler", SAMPLERS[sweep.sampler]),
        ("Stops trials early" if sweep.scheduler != "pbt" else "Scheduler", SCHEDULERS[sweep.scheduler]),
    ]
    return facts


def plots(result: SweepResult) -> dict[str, Any]:
    """The figures, and what their captions need."""
    metrics = wording.metrics_of(result.plan.config)
    found = importance(result, [metric.key for metric in metrics])
    curves = retention_curves(result)
    progress = [progress_plot(result, metric, index) for index, metric in enumerate(metrics)]
    drawn = pareto_metrics(result)
    return {
        "pareto": pareto_plot(result),
        "pareto_names": drawn,
        "not_drawn": sum(
            trial.last is not None and any(metric.of(trial.last) is None for metric in drawn or ())
            for trial in result.trials
        ),
        "importance": found,
        "importance_plot": None if found is None else importance_plot(found, metrics),
        "minimum": MINIMUM,
        "parallel": parallel_plot(result),
        "retention_plots": retention_plots(result, curves) if curves else [],
        "bin_size": max((each.loss.bin_size for each in curves), default=1),
        "progress": [plot for plot in progress if plot is not None],
    }


def _table(result: SweepResult) -> dict[str, Any]:
    return {
        "rows": table_rows(result),
        "metrics": wording.metrics_of(result.plan.config),
        "knobs": wording.short_names(list(result.plan.space.knobs)),
    }


def _reproduction(result: SweepResult, folder: SweepFolder, command: str) -> dict[str, Any]:
    started_with = shlex.join(result.plan.command)
    best = shlex.quote(str(folder.path / "best.yaml"))
    return {
        "started_with": started_with,
        "command": command if command != started_with else None,
        "train": None if result.best is None else f"craft-ray train {best}",
        "space": yaml.safe_dump(dict(result.plan.space.source), sort_keys=False, allow_unicode=True),
        "config": dump_config(result.plan.config),
    }
