"""Trials over their steps: retention loss against its budget, and the objective's metrics at each validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from craft_ray.report.svg import INK, inline_svg, label_log_axis, new_figure
from craft_ray.report.thin import Curve, curve
from craft_ray.run.metrics import Record
from craft_ray.sweep.plots import BEST, DASHED, WITHIN, format_axis, legend, style_of, title_of
from craft_ray.sweep.results import SweepResult, TrialResult
from craft_ray.sweep.trials import TrialFolder, seeds
from craft_ray.sweep.wording import Metric, objective_in, status

MOST_CURVES = 8
"""Trials in addition to the best."""
NEXT_BEST = 4
DECADES_BELOW = 2
"""The loss starts at rounding error; the axis ends this far below the smallest budget."""


@dataclass(frozen=True)
class RetentionCurve:
    """The loss and the budget of a trial's first seed."""

    trial: TrialResult
    loss: Curve
    budget: Curve


def retention_curves(result: SweepResult) -> list[RetentionCurve]:
    """The curves of the best trial and at most MOST_CURVES others, of those that have a retention loss."""
    found = []
    for trial in _interesting(result):
        records = _records(result, trial)
        losses = [_positive(record["craft/retention_loss"]) for record in records]
        if any(loss is not None for loss in losses):
            steps = [record["step"] for record in records]
            budgets = [_positive(record["craft/epsilon"]) for record in records]
            found.append(RetentionCurve(trial, curve(steps, losses), curve(steps, budgets)))
        if len(found) > MOST_CURVES:
            break
    return found


def retention_plots(result: SweepResult, curves: Sequence[RetentionCurve]) -> list[tuple[str, Markup]]:
    """A heading and a plot for each trial, all with the same axes."""
    low, high = _limits(curves)
    last = max(float(each.loss.steps[-1]) for each in curves)
    return [
        (
            f"{_capital(title_of(result, each.trial))}, {_verdict(result, each.trial)}",
            _retention_plot(result, each, (low, high), last),
        )
        for each in curves
    ]


def progress_plot(result: SweepResult, metric: Metric, index: int) -> Markup | None:
    """A metric at each validation of each trial. None if no trial has it.

    Args:
        index: a number that no other such plot on the page has.
    """
    drawn = [trial for trial in result.trials if any(metric.of(report) is not None for report in trial.reports)]
    if not drawn:
        return None
    crowd = min(1.0, (60 / len(drawn)) ** 0.5)
    with new_figure(4.5, 3.1) as figure:
        axes = figure.subplots()
        for trial in drawn:
            known = [(report["step"], value) for report in trial.reports if (value := metric.of(report)) is not None]
            style, end = style_of(result, trial), "o" if trial.finished else "x"
            alpha = style.alpha if trial is result.best else style.alpha * crowd
            axes.plot(
                *zip(*known, strict=True), color=style.color, alpha=alpha, linewidth=style.width, zorder=style.order,
                marker=end, markevery=[-1], markersize=3.6, markeredgewidth=1,
            )  # fmt: skip
        handles = legend(result, lines=True)
        if metric.limit is not None:
            axes.axhline(metric.limit, color=INK, linestyle=DASHED, linewidth=1.1)
            handles.append(Line2D([], [], color=INK, linestyle=DASHED, linewidth=1.1, label="bound"))
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_ylabel(metric.label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        format_axis(axes.yaxis, metric)
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return inline_svg(figure, f"progress-{index}", f"{metric.label} of each trial over its steps")


def _retention_plot(result: SweepResult, each: RetentionCurve, limits: tuple[float, float], last: float) -> Markup:
    color = BEST if each.trial is result.best else WITHIN if each.trial.feasible else INK
    alpha = 0.9 if color != INK else 0.6
    with new_figure(3.1, 2.1) as figure:
        axes = figure.subplots()
        axes.plot(each.loss.steps, each.loss.mean, color=color, alpha=alpha, linewidth=1.1)
        if each.loss.bin_size > 1:
            axes.fill_between(each.loss.steps, each.loss.low, each.loss.high, color=color, alpha=0.15, linewidth=0)
        axes.plot(each.budget.steps, each.budget.mean, color=color, linestyle=DASHED, linewidth=1.4)
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        axes.set_xlim(0, last * 1.02)
        label_log_axis(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        number = each.trial.number
        return inline_svg(figure, f"retention-{number}", f"trial {number}: retention loss and budget over the steps")


def _interesting(result: SweepResult) -> Iterator[TrialResult]:
    """The best trials, then the least violating, then those that were stopped late, then the rest."""
    ranking = result.ranking
    within = [trial for trial in ranking if trial.feasible]
    beyond = [trial for trial in ranking if not trial.feasible]
    unfinished = sorted(
        (trial for trial in result.trials if not trial.finished and trial.last is not None),
        key=lambda trial: (trial.last["step"], trial.last["score"]) if trial.last else (0, 0.0),
        reverse=True,
    )
    yield from within[: NEXT_BEST + 1]
    yield from beyond[:2]
    yield from unfinished[:2]
    yield from (*within[NEXT_BEST + 1 :], *beyond[2:], *unfinished[2:])


def _records(result: SweepResult, trial: TrialResult) -> list[Record]:
    first = seeds(result.plan.config, trial.params)[0]
    return TrialFolder(trial.path).run(first).read_metrics()


def _positive(value: float | None) -> float | None:
    """The value if a log axis can show it."""
    return value if value is not None and math.isfinite(value) and value > 0 else None


def _limits(curves: Sequence[RetentionCurve]) -> tuple[float, float]:
    losses = [float(value) for each in curves for value in (*each.loss.low, *each.loss.high)]
    budgets = [float(value) for each in curves for value in each.budget.mean]
    smallest = min([*budgets, max(losses)])
    return max(min([*losses, *budgets]) / 1.6, smallest / 10**DECADES_BELOW), max([*losses, *budgets]) * 1.8


def _verdict(result: SweepResult, trial: TrialResult) -> str:
    if not trial.finished:
        return status(trial)
    if not objective_in(result.plan.config).subject_to:
        return "finished"
    return "within the bounds" if trial.feasible else "not within the bounds"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
