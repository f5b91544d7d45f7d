"""Parallel coordinates: an axis for each knob and each metric of the objective, a line for each trial."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from craft_ray.report.svg import INK, PAPER, inline_svg, new_figure
from craft_ray.report.wording import NONE
from craft_ray.sweep.importance import is_numeric
from craft_ray.sweep.plots import DASHED, legend, style_of
from craft_ray.sweep.results import SweepResult, TrialResult
from craft_ray.sweep.space import Distribution
from craft_ray.sweep.wording import Metric, metrics_of, short_names, shown, tooltip

MISSING = -0.13
"""Height at which a missing value is drawn."""
MOST_TICKS = 10
LONGEST = 13
"""Characters in a line above an axis."""
INCHES = 1.0
"""From axis to axis."""


@dataclass(frozen=True)
class Axis:
    """A vertical axis from 0 to 1."""

    label: str
    ticks: list[tuple[float, str]]
    heights: list[float | None]
    """The height of each trial; None if it has no value."""
    limit: float | None = None
    """Height of the bound."""


def parallel_plot(result: SweepResult) -> tuple[Markup, int] | None:
    """The plot and its number of axes. None if no trial has reported."""
    trials = sorted(
        (trial for trial in result.trials if trial.last is not None),
        key=lambda trial: (style_of(result, trial).order, _score(trial)),
    )
    if not trials:
        return None
    axes = axes_of(result, trials)
    with new_figure(0.6 + INCHES * len(axes), 3.7) as figure:
        canvas = figure.subplots()
        _draw_axes(canvas, axes)
        strength = _strengths(result, trials)
        for index, trial in enumerate(trials):
            style = style_of(result, trial)
            heights = [axis.heights[index] for axis in axes]
            canvas.plot(
                range(len(axes)), [MISSING if height is None else height for height in heights], color=style.color,
                alpha=style.alpha * strength[trial.number], linewidth=style.width, zorder=style.order,
                gid=f"trial-{trial.number}", solid_joinstyle="round",
            )  # fmt: skip
        handles = legend(result, lines=True)
        if any(axis.limit is not None for axis in axes):
            handles.append(Line2D([], [], color=INK, linestyle=DASHED, linewidth=1.3, label="bound"))
        figure.legend(handles=handles, loc="outside upper left", ncols=2 if len(axes) < 7 else 3)
        titles = {f"trial-{trial.number}": tooltip(result, trial) for trial in trials}
        return inline_svg(figure, "parallel", "the setting and the metrics of each trial as a line", titles), len(axes)


def axes_of(result: SweepResult, trials: Sequence[TrialResult]) -> list[Axis]:
    """The axes of the knobs in the order of the space, then of the bounded metrics and of the objective's."""
    knobs = result.plan.space.knobs
    names = short_names(list(knobs))
    goal, *bounded = metrics_of(result.plan.config)
    return [
        *(knob_axis(names[knob], cases, [_setting(trial, knob) for trial in trials]) for knob, cases in knobs.items()),
        *(metric_axis(metric, [metric.of(trial.last) for trial in trials]) for metric in (*bounded, goal)),
    ]


def knob_axis(label: str, cases: Sequence[Distribution], values: Sequence[tuple[Any, ...]]) -> Axis:
    """The axis of a knob: a range of numbers, or listed values at even distances.

    Args:
        values: for each trial `(value,)`, or `()` if it has none.
    """
    if not is_numeric(cases) or all(case.options for case in cases):
        return _listed(label, cases, values)
    numbers = [number for case in cases for number in case.numbers[:2] + case.options]
    numbers += [value[0] for value in values if value]
    logarithmic = any(case.kind == "loguniform" for case in cases) and min(numbers) > 0
    heights, ticks = _range(min(numbers), max(numbers), logarithmic, False, lambda number: f"{number:.3g}")
    return Axis(label, ticks, [heights(value[0]) if value else None for value in values])


def metric_axis(metric: Metric, values: Sequence[float | None]) -> Axis:
    """The axis of a metric, with the better end at the top and the bound within the range."""
    known = [value for value in (*values, metric.limit) if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    heights, ticks = _range(low, high, False, not metric.higher, metric.form)
    limit = None if metric.limit is None else heights(metric.limit)
    return Axis(metric.key, ticks, [None if value is None else heights(value) for value in values], limit)


def broken(label: str) -> str:
    """A key over several lines, broken after `.`, `/` and `_`."""
    lines = [""]
    for part in label.replace("_", "_\0").replace(".", ".\0").replace("/", "/\0").split("\0"):
        if lines[-1] and len(lines[-1] + part) > LONGEST:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _listed(label: str, cases: Sequence[Distribution], values: Sequence[tuple[Any, ...]]) -> Axis:
    options = [option for case in cases for option in (case.options or ())]
    options += [value[0] for value in values if value]
    distinct = {json.dumps(option): option for option in options}
    if is_numeric(cases):
        distinct = dict(sorted(distinct.items(), key=lambda item: item[1]))
    heights = {name: (0.5 if len(distinct) == 1 else i / (len(distinct) - 1)) for i, name in enumerate(distinct)}
    named = [(heights[name], _short(shown(option))) for name, option in distinct.items()]
    ticks = named[:: -(-len(named) // MOST_TICKS)]
    return Axis(label, ticks, [heights[json.dumps(value[0])] if value else None for value in values])


def _range(
    low: float, high: float, logarithmic: bool, inverted: bool, form: Callable[[float], str]
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """The height of a number between two others, and ticks at the ends and in the middle."""
    scale: Callable[[float], float] = math.log if logarithmic else float
    unscale: Callable[[float], float] = math.exp if logarithmic else float
    start, span = scale(low), scale(high) - scale(low)

    def height(number: float) -> float:
        part = (scale(number) - start) / span if span else 0.5
        return 1 - part if inverted else part

    marks = [low, unscale(start + span / 2), high] if span else [low]
    return height, [(height(number), form(number)) for number in marks]


def _setting(trial: TrialResult, knob: str) -> tuple[Any, ...]:
    return (trial.params[knob],) if knob in trial.params else ()


def _score(trial: TrialResult) -> float:
    return trial.last["score"] if trial.last is not None else 0.0


def _strengths(result: SweepResult, trials: Sequence[TrialResult]) -> dict[int, float]:
    """The better a trial within the bounds, the stronger its line."""
    within = sorted((trial for trial in trials if trial.feasible), key=_score)
    strength = {trial.number: 0.45 + 0.55 * (position + 1) / len(within) for position, trial in enumerate(within)}
    crowd = min(1.0, (40 / len(trials)) ** 0.5)
    faded = {trial.number: crowd for trial in trials if not trial.feasible}
    alone = {result.best.number: 1.0} if result.best is not None else {}
    return strength | faded | alone


def _draw_axes(canvas: Axes, axes: Sequence[Axis]) -> None:
    gaps = any(height is None for axis in axes for height in axis.heights)
    canvas.axis("off")
    canvas.set_xlim(-0.45, len(axes) - 0.45)
    canvas.set_ylim(MISSING - 0.05 if gaps else -0.05, 1.05)
    for place, axis in enumerate(axes):
        canvas.plot([place, place], [0, 1], color=INK, linewidth=0.8, alpha=0.7, zorder=1)
        canvas.text(place, 1.06, broken(axis.label), ha="center", va="bottom", fontsize=8.5, linespacing=1.1)
        has_gap = any(height is None for height in axis.heights)
        for height, text in (*axis.ticks, *([(MISSING, NONE)] if has_gap else [])):
            canvas.plot([place - 0.03, place + 0.03], [height, height], color=INK, linewidth=0.8, zorder=1)
            canvas.text(
                place + 0.06, height, text, ha="left", va="center", fontsize=7.5, zorder=8,
                bbox={"facecolor": PAPER, "alpha": 0.72, "linewidth": 0, "pad": 0.6},
            )  # fmt: skip
        if axis.limit is not None:
            canvas.plot(
                [place - 0.3, place + 0.3], [axis.limit] * 2, color=INK, linestyle=DASHED, linewidth=1.3, zorder=7
            )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST + 1 else text[:LONGEST] + "…"
