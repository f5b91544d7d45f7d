"""The report of finished runs: a self-contained `report.html`, and the same numbers as `result.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from craft_ray.config import dump_config
from craft_ray.errors import ConfigError
from craft_ray.report import wording
from craft_ray.report.about import facts
from craft_ray.report.certificates import certificates, verdicts
from craft_ray.report.examples import examples
from craft_ray.report.losses import loss_plot
from craft_ray.report.page import template
from craft_ray.report.paired import kept_interval, paired, sampling_interval
from craft_ray.report.plots import cosine_plot, pareto_plot, retention_plot, series
from craft_ray.report.replies import replies
from craft_ray.report.rollouts import rollouts
from craft_ray.report.runs import FinishedRun, read_runs
from craft_ray.report.settings import differences
from craft_ray.report.skills import skill_rows, skills_plot
from craft_ray.report.summary import new_ratio, old_ratio, one_old_metric, summarize
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import Record
from craft_ray.storage.files import write_atomically
from craft_ray.storage.paths import StoragePath


def write_report(runs: Sequence[RunFolder], target: StoragePath, *, title: str, command: str) -> dict[str, Any]:
    """Write `report.html` and `result.json` into the folder `target`, and return what `result.json` holds.

    Args:
        title: the heading.
        command: what reproduces this report, and its runs if it ran them.

    Raises:
        ConfigError: a run is not finished, or the runs are not comparable.
        StorageError: the files could not be written.
    """
    if any(target.absolute() == folder.path.absolute() for folder in runs):
        raise ConfigError(
            f"{target} is a run directory, and the report would replace its result.json: choose another folder (--out)"
        )
    finished = read_runs(runs)
    different = differences(finished)
    results = [run.result for run in finished]
    summary = summarize(results)
    content = {"runs": results, "summary": summary, "command": command, "environment": environments(finished)}
    page = template("report.html.j2").render(
        title=title,
        command=command,
        summary=summary,
        environments=content["environment"],
        differences=different,
        **view(finished, summary),
    )
    write_atomically(target / "report.html", page)
    write_atomically(target / "result.json", json.dumps(content, indent=2))
    return content


def environments(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """What the runs ran on, one entry per distinct environment: the names of its `runs`, and their env.json without the
    command and the time. Runs whose folder has no env.json have `packages: null`."""
    found: list[dict[str, Any]] = []
    for run in runs:
        recorded = {"packages": None} if run.environment is None else run.environment
        own = {key: value for key, value in recorded.items() if key not in ("command", "started")}
        same = next((entry for entry in found if {k: v for k, v in entry.items() if k != "runs"} == own), None)
        if same is None:
            found.append({"runs": [run.name], **own})
        else:
            same["runs"].append(run.name)
    return found


def view(runs: Sequence[FinishedRun], summary: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the template shows in addition to the numbers."""
    arms = {arm: [run for run in runs if run.arm == arm] for arm in summary}
    constrained = {arm: chosen for arm, chosen in arms.items() if chosen[0].config.craft.enabled}
    baseline = {run.seed: run for run in runs if run.arm == "baseline"}
    plain = {seed: run.result for seed, run in baseline.items()}

    def arm_interval(arm: str, key: str, alone: Callable[[FinishedRun], list[float] | None]) -> list[float] | None:
        """Over the seeds of an arm; of a single run over its samples."""
        over_seeds: list[float] | None = summary[arm][f"{key}_interval"]
        return alone(arms[arm][0]) if len(arms[arm]) == 1 else over_seeds

    def after_interval(arm: str, skill: str) -> list[float] | None:
        if summary[arm][f"{skill}_after"] is None:
            return None
        return arm_interval(arm, f"{skill}_after", lambda run: sampling_interval(run, skill, "after"))

    def old_ratio_interval(arm: str) -> list[float] | None:
        return arm_interval(arm, "old_ratio", lambda run: kept_interval(run, "old", run, "before"))

    def new_ratio_interval(arm: str) -> list[float] | None:
        def of_plain(run: FinishedRun) -> list[float] | None:
            return kept_interval(run, "new", baseline[run.seed], "after") if run.seed in baseline else None

        return None if arm == "baseline" else arm_interval(arm, "new_ratio", of_plain)

    return {
        "runs": runs,
        "arms": arms,
        "groups": [
            (label, {arm: n for arm, n in summary.items() if arms[arm][0].config.old_data == kind})
            for kind, label in wording.OLD_DATA.items()
        ],
        "styles": {run.arm: run.style for run in runs},
        "configs": {arm: dump_config(chosen[0].config) for arm, chosen in arms.items()},
        "headline": wording.headline(runs, summary),
        "certificates": certificates(runs),
        "verdicts": verdicts,
        "continuations": wording.continuations(runs),
        "metrics": wording.METRICS,
        "relative_to": wording.relative_to,
        "sample_count": wording.sample_count,
        "facts": facts(runs),
        "sampling_interval": sampling_interval,
        "after_interval": after_interval,
        "old_ratio_interval": old_ratio_interval,
        "new_ratio_interval": new_ratio_interval,
        "paired": paired(runs),
        "one_old_metric": one_old_metric([run.result for run in runs]),
        "units": wording.loss_units(runs),
        "held": {arm: wording.is_held(chosen[0]) for arm, chosen in arms.items()},
        "is_held": wording.is_held,
        "loss_unit": wording.loss_unit,
        "judged_on": wording.judged_on,
        "workers": list(dict.fromkeys(wording.workers_of(run) for run in runs)),
        "old_ratio": old_ratio,
        "new_ratio": lambda run: new_ratio(run.result, plain.get(run.seed)),
        "pareto": pareto_plot(runs),
        "losses": loss_plot(runs),
        "skill_rows": skill_rows(runs),
        "retention_plots": {
            arm: skills_plot(chosen) or retention_plot(chosen, _plain_with_same_loss(chosen[0], runs))
            for arm, chosen in constrained.items()
            if _has(chosen, "craft/retention_loss")
        },
        "cosine_plots": {
            arm: cosine_plot(chosen) for arm, chosen in constrained.items() if _has(chosen, "craft/grad_cos")
        },
        "conflicts": {arm: _conflicts(chosen) for arm, chosen in constrained.items()},
        "bin_size": max((series(run, "craft/lambda").bin_size for run in runs if run.arm != "baseline"), default=1),
        "examples": examples(runs),
        "replies": replies(runs),
        "rollouts": rollouts(runs),
        "teachers": sorted({run.teacher for run in runs if run.teacher is not None}),
        "caches": sorted({run.result["cache"] for run in runs if run.result.get("cache") is not None}),
    }


def _plain_with_same_loss(run: FinishedRun, runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Plain fine-tuning runs with the same retention loss as `run`, so that both fit on one axis."""

    def measure(of: FinishedRun) -> tuple[Any, ...]:
        craft = of.config.craft
        return (craft.retention_mode, craft.loss_type, craft.positions, craft.layers, craft.anchor_holdout)

    return [
        other for other in runs
        if other.arm == "baseline" and other.result["retention_loss"] is not None and measure(other) == measure(run)
    ]  # fmt: skip


def _has(runs: Sequence[FinishedRun], key: str) -> bool:
    return any(record[key] is not None for run in runs for record in run.metrics)


def _conflicts(runs: Sequence[FinishedRun]) -> float | None:
    """Share of the retention steps in which the gradients were in conflict."""
    judged: list[Record] = [r for run in runs for r in run.metrics if r["craft/conflict"] is not None]
    return statistics.fmean(record["craft/conflict"] for record in judged) if judged else None
