"""The loss of the new skill over the steps, an arm in its colour."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from craft_ray.report.runs import FinishedRun
from craft_ray.report.svg import inline_svg, new_figure
from craft_ray.report.thin import Curve, curve

POINTS = 60
"""Points of a curve: the loss of a step is that of one batch, so it is noisy."""


def loss_plot(runs: Sequence[FinishedRun]) -> Markup | None:
    """Each run as a thin line, and the mean over the seeds of an arm as a thick one. None if no run took a step."""
    trained = [run for run in runs if run.metrics]
    if not trained:
        return None
    arms = {run.arm: [other for other in trained if other.arm == run.arm] for run in trained}
    with new_figure(7.2, 3.2 + 0.2 * max(0, len(arms) - 4) / 3) as figure:
        axes, handles = figure.subplots(), []
        for chosen in arms.values():
            style, curves = chosen[0].style, [_smoothed(run) for run in chosen]
            for data in curves:
                axes.plot(data.steps, data.mean, color=style.color, linewidth=0.8, alpha=0.45 if curves[1:] else 1)
            if curves[1:] and len({len(data.steps) for data in curves}) == 1:
                mean = [statistics.fmean(values) for values in zip(*(data.mean for data in curves), strict=True)]
                axes.plot(curves[0].steps, mean, color=style.color, linewidth=1.8)
            handles.append(Line2D([], [], color=style.color, linewidth=1.8, label=style.label))
        axes.set_xlabel("step")
        axes.set_ylabel("loss of the new skill")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
        return inline_svg(figure, "losses", "training loss of the new skill over the steps, by arm")


def _smoothed(run: FinishedRun) -> Curve:
    return curve([r["step"] for r in run.metrics], [r["train/loss"] for r in run.metrics], most=POINTS)
