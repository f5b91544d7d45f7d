"""The table of a sweep's trials, to be saved."""

from __future__ import annotations

from typing import Any

from craft_ray.report.table import Table
from craft_ray.report.wording import NONE, number
from craft_ray.sweep import wording
from craft_ray.sweep.html import Row, table_rows
from craft_ray.sweep.results import SweepResult


def trials_table(result: SweepResult) -> Table:
    """All trials in the order of the report: finished ones by rank, then the stopped, the open and the failed ones."""
    rows = table_rows(result)
    metrics = wording.metrics_of(result.plan.config)
    knobs = wording.short_names(list(result.plan.space.knobs))
    headings = [
        "Rank", "Trial", "Status", "Within bounds", *(f"{metric.key} {metric.bound}".strip() for metric in metrics),
        "Violation", "Seeds", "Steps", "Time", *knobs.values(),
    ]  # fmt: skip
    shown = [_shown(row) for row in rows]
    return Table("trials", "All trials, on validation data", headings, shown, [_record(result, row) for row in rows])


def _shown(row: Row) -> list[str]:
    trial = row.trial
    last = [NONE] * 3
    if trial.last is not None:
        last = [str(trial.last["seeds"]), str(trial.last["step"]), f"{trial.last['seconds']:.0f} s"]
    within = {None: NONE, True: "yes", False: "no"}[trial.feasible]
    return [
        NONE if row.rank is None else str(row.rank), str(trial.number), trial.outcome.status, within, *row.numbers,
        number(row.violation), *last, *row.knobs,
    ]  # fmt: skip


def _record(result: SweepResult, row: Row) -> dict[str, Any]:
    trial, last = row.trial, row.trial.last
    reached = {key: None if last is None else last[key] for key in ("seeds", "step", "seconds")}
    return {
        "rank": row.rank, "trial": trial.number, "status": trial.outcome.status, "reason": trial.outcome.reason,
        "feasible": trial.feasible,
        **{metric.key: metric.of(last) for metric in wording.metrics_of(result.plan.config)},
        "violation": row.violation, **reached,
        **{knob: _plain(trial.params.get(knob)) for knob in result.plan.space.knobs},
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """A setting as a cell holds it: listed values as JSON."""
    return wording.shown(value) if isinstance(value, list | dict) else value
