"""The three plots of the report: retention loss against its budget, old skill against new, angle between gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from craft_ray.report.arms import ARMS
from craft_ray.report.runs import FinishedRun
from craft_ray.report.summary import new_ratio, old_ratio
from craft_ray.report.svg import INK, PAPER, inline_svg, label_log_axis, new_figure
from craft_ray.report.thin import Curve, curve
from craft_ray.report.wording import METRICS, loss_unit
from craft_ray.run.scoring import HIGHER_IS_BETTER, ratio
from craft_ray.statistics import mean_interval

DECADES_BELOW = 3
"""L_ret starts at the cache's rounding error, which would leave the budget a thin strip at the top of a log axis."""

LEGEND_LINE = 0.2
"""Height of a line of the legend in inches."""


def retention_plot(runs: Sequence[FinishedRun], plain: Sequence[FinishedRun]) -> Markup:
    """L_ret against epsilon, and lambda below, over the steps of one arm.

    Args:
        runs: the runs of one arm with CRaFT, one line each.
        plain: plain fine-tuning runs measured with the same retention loss; only the final value is known.
    """
    style = runs[0].style
    with new_figure(4.5, 4.5) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for run in runs:
            _line(top, series(run, "craft/retention_loss"), style.color)
            _line(bottom, series(run, "craft/lambda"), style.color)
        budget = series(runs[0], "craft/epsilon")
        top.plot(budget.steps, budget.mean, color=INK, linestyle=(0, (5, 2)), linewidth=1.3)
        _ends(top, plain, ARMS["baseline"].color, "X")
        _ends(top, runs, style.color, "D")
        top.set_yscale("log")
        _fit_log_axis(top, runs, plain)
        top.set_ylabel(f"retention loss\n({loss_unit(runs[0])})")
        bottom.set_ylabel("multiplier λ")
        bottom.set_xlabel("step")
        bottom.set_ylim(bottom=0)
        bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        bottom.margins(x=0.04)
        ends = "held-out anchors" if runs[0].result["heldout_anchors"] else "all training anchors"
        handles = [
            Line2D([], [], color=style.color, label="training anchors" + (", by seed" if len(runs) > 1 else "")),
            Line2D([], [], color=INK, linestyle=(0, (5, 2)), label="budget ε"),
            _mark(style.color, "D", f"{ends}, at the end"),
        ]
        if plain:
            handles.append(_mark(ARMS["baseline"].color, "X", "plain fine-tuning, held out"))
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return inline_svg(
            figure,
            f"retention-{runs[0].arm}",
            f"{style.label}: retention loss against its budget, and the multiplier, over the training steps",
        )


def cosine_plot(runs: Sequence[FinishedRun]) -> Markup:
    """Cosine between task and retention gradient over the steps of one arm, and its threshold if it has one."""
    style, craft = runs[0].style, runs[0].config.craft
    thresholds = [craft.conflict_threshold] if craft.conflict_measure == "cosine" else []
    with new_figure(4.5, 2.5) as figure:
        axes = figure.subplots()
        for run in runs:
            _line(axes, series(run, "craft/grad_cos"), style.color)
        axes.axhline(0, color=INK, linewidth=0.7, alpha=0.5)
        for threshold in thresholds:
            axes.axhline(threshold, color=INK, linestyle=(0, (2, 2)), linewidth=1.2)
        cosines = [record["craft/grad_cos"] for run in runs for record in run.metrics]
        reach = max(abs(height) for height in (*thresholds, *cosines, 1e-3) if height is not None)
        axes.set_ylim(-1.2 * reach, 1.2 * reach)
        axes.set_xlabel("step")
        axes.set_ylabel("cosine of the gradients")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        handles = [
            Line2D([], [], color=style.color, label="task · retention" + (", by seed" if len(runs) > 1 else "")),
            *(
                Line2D(
                    [], [], color=INK, linestyle=(0, (2, 2)), label=f"conflict below {threshold:g}".replace("-", "−")
                )
                for threshold in thresholds
            ),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return inline_svg(
            figure, f"cosine-{runs[0].arm}", f"{style.label}: cosine between task and retention gradient over the steps"
        )


@dataclass(frozen=True)
class Axis:
    """What is drawn along one axis: a number of each run, and the teacher's (None if it has no such number)."""

    label: str
    of: Callable[[FinishedRun], float | None]
    teacher: float | None
    percent: bool
    inverted: bool = False


def pareto_plot(runs: Sequence[FinishedRun]) -> Markup | None:
    """Old skill against new: a small mark for each run, a large one for each arm's mean. None if a score is missing."""
    if any(run.result[skill]["after"] is None for run in runs for skill in ("old", "new")):
        return None
    across, up = new_axis(runs), old_axis(runs)
    styles = {run.arm: run.style for run in runs}
    with new_figure(5, 3.9 + LEGEND_LINE * max(0, len(styles) - 3) / 2) as figure:
        axes = figure.subplots()
        for axis, line in ((across, axes.axvline), (up, axes.axhline)):
            if axis.percent and "relative" in axis.label:
                line(1, color=INK, linewidth=0.8, alpha=0.45, linestyle=(0, (2, 2)))
        handles = []
        for arm, style in styles.items():
            points = [(_known(across.of(run)), _known(up.of(run))) for run in runs if run.arm == arm]
            _points(axes, points, style.color, style.marker)
            handles.append(_mark(style.color, style.marker, style.label))
        if across.teacher is not None and up.teacher is not None:
            axes.plot(across.teacher, up.teacher, "*", color=INK, markersize=13, zorder=4, clip_on=False)
            handles.append(_mark(INK, "*", "teacher, before", size=10))
        for axis, side in ((across, axes.xaxis), (up, axes.yaxis)):
            if axis.percent:
                side.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.margins(0.08)
        if across.inverted:
            axes.invert_xaxis()
        if up.inverted:
            axes.invert_yaxis()
        axes.set_xlabel(across.label + "  →")
        axes.set_ylabel(up.label + "  →")
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return inline_svg(figure, "pareto", "old skill kept against new skill learned, each run and each arm's mean")


def new_axis(runs: Sequence[FinishedRun]) -> Axis:
    """The new skill relative to plain fine-tuning of the same seed; the score itself if a seed has no plain run."""
    plain = {run.seed: run.result for run in runs if run.arm == "baseline"}
    metric = runs[0].result["new"]["metric"]
    ratios = [new_ratio(run.result, plain.get(run.seed)) for run in runs]
    if None in ratios:
        return _score_axis("new", runs)
    before = [ratio(metric, result["new"]["before"], result["new"]["after"]) for result in plain.values()]
    return Axis(
        _relative("new skill", "plain fine-tuning", metric),
        lambda run: new_ratio(run.result, plain[run.seed]),
        statistics.fmean(_known(value) for value in before),
        percent=True,
    )


def old_axis(runs: Sequence[FinishedRun]) -> Axis:
    """The old skill relative to the teacher; the score itself where the teacher's is zero."""
    if any(old_ratio(run.result) is None for run in runs):
        return _score_axis("old", runs)
    return Axis(
        _relative("old skill", "the teacher", runs[0].result["old"]["metric"]),
        lambda run: old_ratio(run.result),
        1.0,
        percent=True,
    )


def _score_axis(skill: str, runs: Sequence[FinishedRun]) -> Axis:
    metric, higher = runs[0].result[skill]["metric"], HIGHER_IS_BETTER[runs[0].result[skill]["metric"]]
    return Axis(
        f"{skill} skill: {METRICS[metric]}",
        lambda run: run.result[skill]["after"],
        runs[0].result[skill]["before"],
        percent=higher,
        inverted=not higher,
    )


def _relative(skill: str, reference: str, metric: str) -> str:
    inverse = "" if HIGHER_IS_BETTER[metric] else f", inverse {metric}"
    return f"{skill}{inverse}, relative to {reference}"


def series(run: FinishedRun, key: str) -> Curve:
    """A number of the log over the steps, without the steps that do not have it."""
    return curve([record["step"] for record in run.metrics], [record[key] for record in run.metrics])


def _line(axes: Axes, data: Curve, color: str) -> None:
    axes.plot(data.steps, data.mean, color=color, alpha=0.85, linewidth=1.1)
    if data.bin_size > 1:
        axes.fill_between(data.steps, data.low, data.high, color=color, alpha=0.15, linewidth=0)


def _ends(axes: Axes, runs: Sequence[FinishedRun], color: str, marker: str) -> None:
    """The loss on held-out anchors, at the last step."""
    for run in runs:
        axes.plot(
            run.result["steps"], run.result["retention_loss"], marker, color=color, markersize=7,
            markeredgecolor=PAPER, markeredgewidth=0.8, zorder=5, clip_on=False,
        )  # fmt: skip


def _fit_log_axis(axes: Axes, runs: Sequence[FinishedRun], plain: Sequence[FinishedRun]) -> None:
    values = [record["craft/retention_loss"] for run in runs for record in run.metrics]
    values += [run.result["retention_loss"] for run in (*runs, *plain)]
    positive = [value for value in values if value and math.isfinite(value)]
    budget = runs[0].result["epsilon"]
    top = max([*positive, runs[0].config.craft.epsilon_start])
    bottom = max(min([*positive, budget]) / 1.6, budget / 10**DECADES_BELOW)
    axes.set_ylim(bottom, top * 2.2)
    label_log_axis(axes.yaxis)


def _points(axes: Axes, points: Sequence[tuple[float, float]], color: str, marker: str) -> None:
    """Small marks, and their mean with 95 % intervals where there are several."""
    axes.plot(*zip(*points, strict=True), marker, color=color, markersize=5.5, alpha=0.7, markeredgewidth=0, zorder=2)
    x, y = ([point[i] for point in points] for i in (0, 1))
    middle = (statistics.fmean(x), statistics.fmean(y))
    for values, where in ((x, "x"), (y, "y")):
        bounds = mean_interval(values)
        if bounds is not None:
            line: Any = (bounds, [middle[1]] * 2) if where == "x" else ([middle[0]] * 2, bounds)
            axes.plot(*line, color=color, linewidth=1.4, alpha=0.8, zorder=3)
    axes.plot(
        *middle, marker, color=color, markersize=11, markeredgecolor=PAPER, markeredgewidth=1.2, zorder=5, clip_on=False
    )


def _mark(color: str, marker: str, label: str, size: float = 7) -> Line2D:
    return Line2D([], [], color=color, marker=marker, linestyle="none", markersize=size, label=label)


def _known(value: float | None) -> float:
    assert value is not None
    return value
