"""The tables of the report, to be saved: the arms, the certificates, each old skill, all runs, and the settings that
differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from craft_ray.report import wording
from craft_ray.report.certificates import certificates_table
from craft_ray.report.runs import FinishedRun
from craft_ray.report.settings import differences
from craft_ray.report.skills import skill_rows
from craft_ray.report.summary import new_ratio, old_ratio, one_old_metric, summarize
from craft_ray.report.table import Table


def report_tables(runs: Sequence[FinishedRun]) -> list[Table]:
    """The tables that have a row."""
    tables = [arms_table(runs), certificates_table(runs), skills_table(runs), runs_table(runs), settings_table(runs)]
    return [table for table in tables if table.shown]


def arms_table(runs: Sequence[FinishedRun]) -> Table:
    """The teacher before training, and the means of each arm over its seeds."""
    first, one_metric = runs[0].result, one_old_metric([run.result for run in runs])
    teacher = {
        "arm": "teacher", "runs": None,
        "old_after": first["old"]["before"] if one_metric else None,
        "old_ratio": 1.0 if first["old"]["before"] else None,
        "new_after": first["new"]["before"],
    }  # fmt: skip
    labels = {run.arm: run.style.label for run in runs}
    rows = [teacher, *({"arm": arm, **numbers} for arm, numbers in summarize([run.result for run in runs]).items())]
    scored = ("old_after", "old_ratio", "new_after", "new_ratio")
    records = []
    for row in rows:
        record = {"arm": row["arm"], "runs": row["runs"]}
        for key in (*scored, "retention_loss"):
            record |= {key: row.get(key)} | _bounds(key, row.get(f"{key}_interval"))
        records.append(record | {key: row.get(key) for key in ("epsilon", "feasible", "seconds")})
    shown = [
        [
            labels.get(row["arm"], "Teacher, before"),
            *(_score(row, key, first) for key in scored),
            wording.number(row.get("retention_loss")),
            _epsilon(row.get("epsilon")),
            wording.NONE if row.get("feasible") is None else f"{row['feasible']} of {row['runs']}",
        ]
        for row in rows
    ]
    metrics = [first[skill].get("metric") for skill in ("old", "new")]
    old, new = (wording.METRICS[metric] if metric else "not scored" for metric in metrics)
    headings = [
        "Arm", f"Old skill, {old if one_metric else 'several metrics'}", "Old, of the teacher's", f"New skill, {new}",
        "New, of plain's", "Retention loss", "Budget ε", "Budget met",
    ]  # fmt: skip
    caption = "Means of the arms over seeds; in brackets, 95 % intervals by Student's t"
    return Table("arms", caption, headings, shown, records)


def runs_table(runs: Sequence[FinishedRun]) -> Table:
    """Every run."""
    plain = {run.seed: run.result for run in runs if run.arm == "baseline"}
    records, shown = [], []
    for run in runs:
        result = run.result
        scores = {f"{skill}_{when}": result[skill][when] for skill in ("old", "new") for when in ("before", "after")}
        ratios = {"old_ratio": old_ratio(result), "new_ratio": new_ratio(result, plain.get(run.seed))}
        numbers = {key: result.get(key) for key in ("retention_loss", "epsilon", "feasible", "lambda")}
        ended = {key: result[key] for key in ("steps", "seconds")}
        records.append({"run": run.name, "arm": run.arm, "seed": run.seed, **scores, **ratios, **numbers, **ended})
        shown.append(
            [
                run.name, str(run.seed), *(_after(result[skill]) for skill in ("old", "new")),
                *map(wording.percent, ratios.values()), wording.number(result["retention_loss"]),
                _epsilon(result["epsilon"]), _yes(result["feasible"]), wording.number(result.get("lambda")),
                str(result["steps"]), f"{result['seconds']:.0f} s",
            ]
        )  # fmt: skip
    headings = [
        "Run", "Seed", "Old skill", "New skill", "Of teacher's", "Of plain's", "Retention loss", "ε", "Met", "Final λ",
        "Steps", "Time",
    ]  # fmt: skip
    return Table("runs", "All runs", headings, shown, records)


def skills_table(runs: Sequence[FinishedRun]) -> Table:
    """Each old skill of each run, where a config names several."""
    keys = ("before", "after", "ratio", "ratio_low", "retention_loss", "epsilon", "feasible", "lambda")
    rows = skill_rows(runs)
    records = [
        {
            "run": row["run"].name, "skill": row["skill"], "metric": row.get("metric"),
            **{key: row.get(key) for key in keys}, "keep": row.get("certificate", {}).get("keep"),
            "verdict": row.get("certificate", {}).get("verdict"),
        }
        for row in rows
    ]  # fmt: skip
    shown = [
        [
            row["run"].name, row["skill"],
            *(wording.score_of(row[when], row["metric"]) if row.get("metric") else wording.NONE
              for when in ("before", "after")),
            wording.percent(row.get("ratio")), wording.number(row.get("retention_loss")), row["target"],
            row["certificate"]["verdict"] if row.get("certificate") else _yes(row.get("feasible")),
            wording.number(row.get("lambda")),
        ]
        for row in rows
    ]  # fmt: skip
    headings = ["Run", "Skill", "Before", "After", "Of the teacher's", "Retention loss", "Asked", "Met", "λ"]
    return Table("skills", "Each old skill", headings, shown, records)


def settings_table(runs: Sequence[FinishedRun]) -> Table:
    """The settings in which the arms differ."""
    labels = {run.arm: run.style.label for run in runs}
    found = differences(runs)
    records = [{"setting": row.key, **dict(zip(labels, row.values, strict=True))} for row in found]
    shown = [[row.key, *row.values] for row in found]
    return Table("settings", "Settings that differ", ["Setting", *labels.values()], shown, records)


def _bounds(key: str, interval: Sequence[float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{key}_low": low, f"{key}_high": high}


def _score(row: dict[str, Any], key: str, first: dict[str, Any]) -> str:
    """A score or a ratio, and its interval."""

    def form(value: float | None) -> str:
        if value is None or key.endswith("_ratio"):
            return wording.percent(value)
        return wording.score_of(value, first[key.removesuffix("_after")]["metric"])

    bounds = None if (row["arm"], key) == ("baseline", "new_ratio") else row.get(f"{key}_interval")
    return " ".join(filter(None, [form(row.get(key)), wording.interval(bounds, form)]))


def _after(score: dict[str, Any]) -> str:
    return wording.NONE if score["after"] is None else wording.score_of(score["after"], score["metric"])


def _epsilon(value: float | None) -> str:
    return wording.NONE if value is None else f"{value:g}"


def _yes(value: bool | None) -> str:
    return wording.NONE if value is None else "yes" if value else "no"
