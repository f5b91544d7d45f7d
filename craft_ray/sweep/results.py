"""The results of a sweep: all trials, ranked, as a table, and the best as a config to train again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from craft_ray.config import Experiment, dump_config
from craft_ray.errors import ConfigError, CraftError
from craft_ray.run.folder import RunFolder
from craft_ray.storage.files import new_file, write_atomically
from craft_ray.storage.last import LAST
from craft_ray.storage.paths import StoragePath
from craft_ray.sweep.space import Params
from craft_ray.sweep.trials import Outcome, Plan, Report, SweepFolder, seeds


@dataclass(frozen=True)
class TrialResult:
    """A trial that has started, and its state."""

    number: int
    params: Params
    outcome: Outcome
    reports: list[Report]
    path: StoragePath

    @property
    def last(self) -> Report | None:
        return self.reports[-1] if self.reports else None

    @property
    def finished(self) -> bool:
        return self.outcome.status == "finished"

    @property
    def feasible(self) -> bool | None:
        """Whether it is within all bounds; None before the first report."""
        return None if self.last is None else bool(self.last["feasible"])


@dataclass(frozen=True)
class SweepResult:
    """All trials of a sweep."""

    plan: Plan
    trials: list[TrialResult]
    """By number."""

    @property
    def ranking(self) -> list[TrialResult]:
        """The trials that ran to completion, best first: those within the bounds by the metric, then the others, the
        least violating first. A trial that was stopped early has no rank: its numbers are of an unfinished run."""
        done = [(trial, trial.last) for trial in self.trials if trial.finished]
        return [trial for trial, last in sorted(done, key=lambda pair: -pair[1]["score"] if pair[1] else 0.0)]

    @property
    def best(self) -> TrialResult | None:
        """The first of the ranking. Check its `feasible`."""
        return next(iter(self.ranking), None)

    def config(self, trial: TrialResult) -> Experiment:
        """The config that trains a trial again."""
        name = re.sub(r"[^\w.-]", "-", f"{trial.path.parents[1].name}-trial{trial.number}")
        return self.plan.config.changed({**trial.params, "name": name})


def read_results(folder: SweepFolder) -> SweepResult:
    """All trials of a sweep, finished or not."""
    trials = [
        TrialResult(trial.number, trial.params() or {}, trial.outcome(), trial.reports(), trial.path)
        for trial in folder.trials()
    ]
    return SweepResult(folder.load(), trials)


def write_results(result: SweepResult, folder: SweepFolder) -> None:
    """Write `trials.parquet` and, if a trial finished, `best.yaml`.

    Raises:
        CraftError: no trial finished; the message gives the reason of the first that failed.
    """
    _write_table(result, folder.path / "trials.parquet")
    best = result.best
    if best is None:
        failed = next((trial for trial in result.trials if trial.outcome.status == "failed"), None)
        reason = "all are stopped or open" if failed is None else f"trial {failed.number}: {failed.outcome.reason}"
        raise CraftError(f"no trial of the sweep {folder.path} finished ({reason})")
    write_atomically(folder.path / "best.yaml", _heading(result, best) + dump_config(result.config(best)))


def _heading(result: SweepResult, best: TrialResult) -> str:
    """Where the config comes from, as comments."""
    objective, last = result.plan.config.objective, best.last
    assert objective is not None
    assert last is not None
    lines = [f"Trial {best.number} of {len(result.trials)}: {objective.metric} {last['value']:.6g} on validation data."]
    for metric, bound in objective.subject_to.items():
        kept = "kept" if not last["violations"][metric] else "NOT kept"
        reached = (
            f" ({last['reached'][metric]:.6g} at {objective.confidence:.0%} confidence)" if last["seeds"] > 1 else ""
        )
        lines.append(f"{metric} {last['metrics'][metric]:.6g}{reached}, bound {bound}: {kept}.")
    if last["seeds"] > 1:
        lines.append(f"These are means over {last['seeds']} seeds, of which this config is the first.")
    if result.plan.config.sweep.scheduler == "pbt":
        run = RunFolder(best.path / f"seed{seeds(result.plan.config, best.params)[0]}")
        lines.append("Population based training may have changed settings during training; these are the last ones.")
        lines.append(f"The model that it trained is in {run.checkpoints / LAST / 'model'}.")
    return "".join(f"# {line}\n" for line in lines)


PLAIN = {
    "trial": pa.int64(), "rank": pa.int64(), "status": pa.string(), "reason": pa.string(), "feasible": pa.bool_(),
    "value": pa.float64(), "violation": pa.float64(), "steps": pa.int64(), "seconds": pa.float64(),
    "config": pa.string(),
}  # fmt: skip
REPORT = {
    "step": pa.int64(), "seeds": pa.int64(), "params": pa.string(), "value": pa.float64(), "violation": pa.float64(),
    "feasible": pa.bool_(), "score": pa.float64(), "seconds": pa.float64(),
    "metrics": pa.map_(pa.string(), pa.float64()),
}  # fmt: skip


def _write_table(result: SweepResult, path: StoragePath) -> None:
    """One row per trial. Knobs are columns `param:KEY`; the numbers of each validation are in the list `reports`."""
    rank = {trial.number: position for position, trial in enumerate(result.ranking, 1)}
    rows = [_row(result, trial, rank.get(trial.number)) for trial in result.trials]
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in PLAIN.items()}
    columns["reports"] = pa.array([row["reports"] for row in rows], pa.list_(pa.struct(REPORT.items())))
    for key in result.plan.space.knobs:
        columns[f"param:{key}"] = pa.array(*_column([trial.params.get(key) for trial in result.trials]))
    with new_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _row(result: SweepResult, trial: TrialResult, rank: int | None) -> dict[str, Any]:
    reports = [
        report
        | {
            "violation": sum(report["violations"].values()),
            "metrics": list(report["metrics"].items()),
            "params": json.dumps(report["params"]),
        }
        for report in trial.reports
    ]
    last = reports[-1] if reports else {"feasible": None, "value": None, "violation": None, "step": 0, "seconds": 0.0}
    return {
        "trial": trial.number,
        "rank": rank,
        "status": trial.outcome.status,
        "reason": trial.outcome.reason,
        "steps": last["step"],
        "config": _config_or_none(result, trial),
        "reports": [{name: report[name] for name in REPORT} for report in reports],
        **{name: last[name] for name in ("feasible", "value", "violation", "seconds")},
    }


def _config_or_none(result: SweepResult, trial: TrialResult) -> str | None:
    """None for a trial that failed because its setting is not a valid config."""
    try:
        return dump_config(result.config(trial))
    except ConfigError:
        return None


def _column(values: Sequence[Any]) -> tuple[list[Any], pa.DataType]:
    """Values of one knob as a column: numbers, booleans and text as they are, mixed or listed values as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and kinds != {int}:
        return [None if value is None else float(value) for value in values], pa.float64()
    for kind, arrow in ((int, pa.int64()), (bool, pa.bool_()), (str, pa.string())):
        if kinds == {kind}:
            return list(values), arrow
    return [None if value is None else json.dumps(value) for value in values], pa.string()
