"""What is certified of each run: for every old skill a target or a budget, the verdict, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from craft_ray.report.runs import FinishedRun
from craft_ray.report.table import Table
from craft_ray.report.wording import NONE, is_held, number, percent
from craft_ray.run.kept import in_words
from craft_ray.run.metrics import judged_in_words, unreached

Row = dict[str, Any]

NUMBERS = ("retention_loss", "epsilon", "lambda", "slackness")
VERDICTS = ("met", "not met", "undecided")


def certificates(runs: Sequence[FinishedRun]) -> list[Row]:
    """A row for each old skill of each run that was held to a target or a budget.

    A row has the `run`, the `skill` (None where the config names none), what was `asked`, the `verdict` and the
    `sentence`; the part of the teacher's score that is `kept`, its one-sided lower bound `kept_low`, and
    `samples_to_decide`; `retention_loss` on held-out anchors, `epsilon`, `lambda`, `slackness`, λ (L_ret - ε), and
    `stationarity`, which is that of the run with all its skills. A number that there is not is None.
    """
    return [
        _row(run, skill, found)
        for run in runs
        if is_held(run)
        for skill, found in _skills(run)
        if "certificate" in found or (found.get("retention_loss") is not None and found.get("multiplier") != "fixed")
    ]


def verdicts(rows: Sequence[Row]) -> str:
    """How many were met: `6 certificates: 4 met, 2 undecided`."""
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"{len(rows)} certificate{'' if len(rows) == 1 else 's'}: {found}"


def certificates_table(runs: Sequence[FinishedRun]) -> Table:
    """The numbers of every certificate."""
    rows = certificates(runs)
    keys = ("skill", "asked", "verdict", "kept", "kept_low", "samples_to_decide", *NUMBERS, "stationarity")
    records = [{"run": row["run"].name, **{key: row[key] for key in keys}} for row in rows]
    shown = [
        [
            row["run"].name, row["skill"] or NONE, row["asked"], percent(row["kept"]), percent(row["kept_low"]),
            row["verdict"], *(number(row[key]) for key in NUMBERS), number(row["stationarity"]),
        ]
        for row in rows
    ]  # fmt: skip
    headings = [
        "Run", "Skill", "Asked", "Kept", "At least", "Verdict", "Retention loss", "ε", "λ", "λ (L_ret − ε)",
        "Stationarity",
    ]  # fmt: skip
    return Table("certificates", "What is certified; lower bounds are one-sided at 95 %", headings, shown, records)


def _skills(run: FinishedRun) -> Iterator[tuple[str | None, Row]]:
    """What the result says about each old skill, with its scores."""
    result = run.result
    skills: dict[str, Row] = result.get("skills", {})
    if skills:
        yield from skills.items()
    else:
        yield None, {**result["old"], **result}


def _row(run: FinishedRun, skill: str | None, found: Row) -> Row:
    stated: Row = found.get("certificate", {})
    row: Row = {
        "run": run,
        "skill": skill,
        "kept": stated.get("kept", found.get("ratio")),
        "kept_low": stated.get("kept_low", found.get("ratio_low")),
        "samples_to_decide": stated.get("samples_to_decide"),
        "stationarity": run.result.get("stationarity"),
        **{key: found.get(key) for key in NUMBERS},
    }
    if stated:
        row |= {"asked": f"keep {100 * stated['keep']:g} %", "verdict": stated["verdict"]}
        words = in_words(stated, _of(skill))
    else:
        row |= {"asked": f"ε {found['epsilon']:g}", "verdict": "met" if found["feasible"] else "not met"}
        words = _budget_in_words(row, found)
    return row | {"sentence": f"{run.style.label}, seed {run.seed}: {words}."}


def _of(skill: str | None) -> str:
    return "the old skill" if skill is None else f"the skill {skill}"


def _budget_in_words(row: Row, found: Row) -> str:
    whose = "" if row["skill"] is None else f" of {_of(row['skill'])}"
    parts = [
        f"budget {row['asked']}{whose}: {row['verdict']}{unreached(found)}",
        f"retention loss {number(row['retention_loss'])} on {judged_in_words(found)}",
    ]
    if row["slackness"] is not None:
        if row["lambda"] == 0:
            parts.append("λ is 0: at the end the budget cost nothing")
        else:
            capped = " at its cap" if row["lambda"] >= found.get("lambda_max", float("inf")) else ""
            parts.append(f"with λ {number(row['lambda'])}{capped}, λ (L_ret − ε) is {number(row['slackness'])}")
    if row["stationarity"] is not None and row["lambda"] and row["skill"] is None:
        parts.append(f"the gradients balance except for {percent(row['stationarity'])} of the new skill's")
    return "; ".join(parts)
