"""Several old skills in a report: a table with each one's score, budget and multiplier, and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from craft_ray.config import scores_of
from craft_ray.report.runs import FinishedRun
from craft_ray.report.svg import INK, inline_svg, new_figure
from craft_ray.report.thin import curve

STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
"""Lines of the skills; of more than these, some share one."""


def skill_rows(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """For each run and skill what `result.json` says about it; none if there is one skill without a name."""
    return [
        {"run": run, "skill": name, "target": _target(found, run.arm), **found}
        for run in runs
        for name, found in run.result.get("skills", {}).items()
    ]


def _target(found: dict[str, Any], arm: str) -> str:
    """What was asked of a skill."""
    if "certificate" in found:
        return f"keep {100 * found['certificate']['keep']:g} %"
    if arm == "baseline" or "epsilon" not in found or found.get("multiplier") == "fixed":
        return "–"
    return f"ε {found['epsilon']:g}"


def skills_plot(runs: Sequence[FinishedRun]) -> Markup | None:
    """L_ret of each skill over its budget, and its multiplier, over the steps of one arm; None without several."""
    style, skills = runs[0].style, list(runs[0].config.skills)
    if not skills or not runs[0].config.craft.enabled:
        return None
    with new_figure(4.5, 4.5) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        handles = []
        for number, skill in enumerate(skills):
            prefix, line = scores_of(skill), STYLES[number % len(STYLES)]
            for run in runs:
                steps = [record["step"] for record in run.metrics]
                losses = [record[f"{prefix}/retention_loss"] for record in run.metrics]
                budgets = [record[f"{prefix}/epsilon"] for record in run.metrics]
                spent = [None if a is None else a / b for a, b in zip(losses, budgets, strict=True)]
                for axes, values in ((top, spent), (bottom, [record[f"{prefix}/lambda"] for record in run.metrics])):
                    data = curve(steps, values)
                    axes.plot(data.steps, data.mean, color=style.color, linestyle=line, linewidth=1.2)
            handles.append(Line2D([], [], color=style.color, linestyle=line, label=skill))
        top.axhline(1, color=INK, linewidth=1.0)
        top.set_ylabel("retention loss\nof its budget ε")
        top.set_ylim(bottom=0)
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("multiplier λ")
        bottom.set_xlabel("step")
        bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
        words = f"{style.label}: retention loss of each skill over its budget, and its multiplier, over the steps"
        return inline_svg(figure, f"skills-{runs[0].arm}", words)
