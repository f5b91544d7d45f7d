"""Plots of the trials of a sweep: old skill against new, and the association of each knob with each metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from craft_ray.report.svg import INK, PAPER, inline_svg, new_figure
from craft_ray.run.held_out import eval_sets
from craft_ray.run.scoring import HIGHER_IS_BETTER
from craft_ray.sweep.importance import Association, Importance
from craft_ray.sweep.results import SweepResult, TrialResult
from craft_ray.sweep.wording import Metric, metric_of, metrics_of, short_names, tooltip

BEST, WITHIN = "#d55e00", "#0f82c4"
"""The best trial, and those within the bounds; the others are pale, in the page's text colour."""
SERIES = ("#0f82c4", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
DASHED = (0, (5, 2))
MOST_LABELLED = 12
CROWDED = (0.07, 0.055)
"""Labels closer than this, as fractions of the axes, would overlap."""


@dataclass(frozen=True)
class TrialStyle:
    """How a trial is drawn in every plot."""

    color: str
    alpha: float
    width: float
    order: int


def style_of(result: SweepResult, trial: TrialResult) -> TrialStyle:
    """The first of the ranking in its own colour on top, those within the bounds in colour, unfinished ones thin."""
    if trial is result.best:
        return TrialStyle(BEST, 1.0, 2.4, 6)
    color, alpha = (WITHIN, 0.85) if trial.feasible else (INK, 0.4)
    return TrialStyle(color, alpha, 1.3, 4) if trial.finished else TrialStyle(color, alpha * 0.7, 0.8, 3)


def title_of(result: SweepResult, trial: TrialResult) -> str:
    """What a trial is called in a legend."""
    if trial is not result.best:
        return f"trial {trial.number}"
    return f"{'best' if trial.feasible else 'least violating'}, trial {trial.number}"


def legend(result: SweepResult, lines: bool) -> list[Line2D]:
    """An entry for each kind of trial that occurs, as lines or as marks."""
    bounded = any(metric.limit is not None for metric in metrics_of(result.plan.config))
    rest = [trial for trial in result.trials if trial.last is not None and trial is not result.best]
    handles = []
    if result.best is not None:
        handles.append(_entry(title_of(result, result.best), style_of(result, result.best), lines, star(result.best)))
    for feasible, finished in ((True, True), (False, True), (True, False), (False, False)):
        kind = [trial for trial in rest if trial.feasible is feasible and trial.finished is finished]
        if kind:
            words = [] if finished else ["not finished"]
            words += ["within the bounds" if feasible else "not within the bounds"] if bounded else []
            handles.append(_entry(", ".join(words) or "finished", style_of(result, kind[0]), lines, mark(kind[0])))
    return handles


def mark(trial: TrialResult) -> dict[str, Any]:
    """How a trial is marked: full where it finished, small and hollow where it did not."""
    if trial.finished:
        return {"marker": "o", "markersize": 6.5, "markeredgewidth": 0}
    return {"marker": "o", "markersize": 4.5, "markerfacecolor": "none", "markeredgewidth": 1.1}


def star(trial: TrialResult) -> dict[str, Any]:
    """How the first of the ranking is marked: a star, hollow where it is not within the bounds."""
    hollow = {} if trial.feasible else {"markerfacecolor": PAPER}
    return {"marker": "*", "markersize": 14, "markeredgewidth": 1.1, **hollow}


def format_axis(axis: Any, metric: Metric) -> None:
    """Percentages where the metric is one."""
    if metric.percent:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _entry(label: str, style: TrialStyle, lines: bool, marked: dict[str, Any]) -> Line2D:
    if lines:
        return Line2D([], [], color=style.color, alpha=style.alpha, linewidth=style.width, label=label)
    return Line2D([], [], color=style.color, alpha=style.alpha, linestyle="none", label=label, **marked)


# -- old skill against new


def pareto_metrics(result: SweepResult) -> tuple[Metric, Metric] | None:
    """What is drawn across and up: new and old skill where both were measured, preferably as in the objective;
    otherwise the objective's metric and the first bounded one. None if there are not two."""
    config = result.plan.config
    own = [metric.key for metric in metrics_of(config)]
    old, new = ([key for key in own if key.startswith(f"{skill}/")] for skill in ("old", "new"))
    across = _first_measured(result, [*new, _skill(result, "new"), own[0]])
    up = _first_measured(result, [*old, "old/ratio", "old/score", *own[1:], own[0]], across)
    if across is None or up is None:
        return None
    return metric_of(config, across), metric_of(config, up)


def pareto_front(points: Sequence[tuple[float, float]], higher: tuple[bool, bool]) -> list[int]:
    """The points that no other point dominates (as good in both directions, better in one), worst across first.

    Args:
        higher: whether more is better, for each direction.
    """
    signed = [tuple(value if more else -value for value, more in zip(point, higher, strict=True)) for point in points]
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: signed[i], reverse=True):
        if not front or signed[index][1] > signed[front[-1]][1] or signed[index] == signed[front[-1]]:
            front.append(index)
    return front[::-1]


def pareto_plot(result: SweepResult) -> Markup | None:
    """Every trial at its last report. None if no two metrics can be plotted against each other."""
    chosen = pareto_metrics(result)
    if chosen is None:
        return None
    across, up = chosen
    points = {
        trial.number: (x, y)
        for trial in result.trials
        if (x := across.of(trial.last)) is not None and (y := up.of(trial.last)) is not None
    }
    if not points:
        return None
    shown = [trial for trial in result.trials if trial.number in points]
    finished = [trial.number for trial in shown if trial.finished]
    on = pareto_front([points[number] for number in finished], (across.higher, up.higher))
    front = [finished[index] for index in on]
    with new_figure(5, 3.9) as figure:
        axes = figure.subplots()
        handles = legend(result, lines=False)
        for metric, line in ((across, axes.axvline), (up, axes.axhline)):
            if metric.limit is not None:
                line(metric.limit, color=INK, linestyle=DASHED, linewidth=1.1)
        if across.limit is not None or up.limit is not None:
            handles.append(Line2D([], [], color=INK, linestyle=DASHED, linewidth=1.1, label="bound"))
        if len(front) > 1:
            steps = list(zip(*(points[number] for number in front), strict=True))
            axes.plot(*steps, drawstyle="steps-pre", color=WITHIN, linewidth=1, alpha=0.7, zorder=2)
            handles.append(Line2D([], [], color=WITHIN, linewidth=1, alpha=0.7, label="front of the finished trials"))
        for trial in shown:
            style, marked = style_of(result, trial), star(trial) if trial is result.best else mark(trial)
            axes.plot(
                *points[trial.number], color=style.color, alpha=style.alpha, zorder=style.order, clip_on=False,
                gid=f"trial-{trial.number}", linestyle="none", **marked,
            )  # fmt: skip
        axes.margins(0.1)
        for metric, side in ((across, axes.xaxis), (up, axes.yaxis)):
            format_axis(side, metric)
            side.set_inverted(not metric.higher)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        first = [] if result.best is None else [result.best.number]
        _label(axes, points, [*first, *front, *(points if len(points) <= MOST_LABELLED else ())])
        axes.set_xlabel(across.label + "  →")
        axes.set_ylabel(up.label + "  →")
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return inline_svg(
            figure,
            "pareto",
            f"{up.label} against {across.label}, each trial",
            {f"trial-{trial.number}": tooltip(result, trial) for trial in shown},
        )


def _skill(result: SweepResult, skill: str) -> str:
    """The metric of a skill for which more is better: its score, or the ratio if the score is a perplexity."""
    config = result.plan.config
    scored = dict(eval_sets(config, "validation")).get(skill)
    inverse = scored is not None and not HIGHER_IS_BETTER[scored.metric]
    return f"{skill}/ratio" if inverse or (skill == "old" and config.skills) else f"{skill}/score"


def _first_measured(result: SweepResult, keys: Sequence[str], other: str | None = None) -> str | None:
    lasts = [trial.last["metrics"] for trial in result.trials if trial.last is not None]
    return next((key for key in keys if key != other and any(last.get(key) is not None for last in lasts)), None)


def _label(axes: Axes, points: dict[int, tuple[float, float]], wanted: Sequence[int]) -> None:
    """Label points with trial numbers in the order of `wanted`, leaving out labels that would overlap."""
    placed: list[Any] = []
    for number in dict.fromkeys(number for number in wanted if number in points):
        position = axes.transAxes.inverted().transform(axes.transData.transform(points[number]))
        if all(abs(position[0] - x) > CROWDED[0] or abs(position[1] - y) > CROWDED[1] for x, y in placed):
            placed.append(position)
            axes.annotate(
                str(number), points[number], xytext=(6, 5), textcoords="offset points", fontsize=8, zorder=7, alpha=0.85
            )


# -- importance


def importance_plot(found: Importance, metrics: Sequence[Metric]) -> Markup:
    """A bar for each knob and metric, with a mark at the share that chance can reach."""
    names = short_names(list(found.of))
    thick = 0.8 / len(metrics)
    with new_figure(5.6, 0.75 + 0.17 * len(metrics) + len(names) * (0.2 + 0.17 * len(metrics))) as figure:
        axes = figure.subplots()
        for row, by_metric in enumerate(found.of.values()):
            for index, metric in enumerate(metrics):
                height = row + (index - (len(metrics) - 1) / 2) * thick
                _bar(axes, height, 0.82 * thick, by_metric[metric.key], SERIES[index % len(SERIES)])
        axes.set_yticks(range(len(names)), list(names.values()))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share of the order of the trials that the knob accounts for")
        handles = [
            Line2D([], [], color=SERIES[index % len(SERIES)], linewidth=5, label=metric.label)
            for index, metric in enumerate(metrics)
        ]
        handles.append(
            Line2D([], [], color=INK, marker="|", markersize=9, markeredgewidth=1.4, linestyle="none",
                   label="exceeded by chance in 1 of 20")
        )  # fmt: skip
        figure.legend(handles=handles, loc="outside upper left", ncols=1)
        return inline_svg(figure, "importance", "association of each knob with each metric of the objective")


def _bar(axes: Axes, height: float, thick: float, found: Association, color: str) -> None:
    if found.share is None or found.chance is None:
        text = f"{found.reason} (n = {found.trials})"
        axes.text(0.008, height, text, va="center", fontsize=7.5, alpha=0.75, style="italic")
        return
    solid = found.share > found.chance + 1e-9
    axes.barh(height, found.share, thick, color=color, alpha=1.0 if solid else 0.4, linewidth=0)
    axes.plot([found.chance] * 2, [height - thick / 2, height + thick / 2], color=INK, linewidth=1.4)
    axes.text(1.03, height, f"{found.share:.2f}  (n = {found.trials})", va="center", fontsize=7.5)
