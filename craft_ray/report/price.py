"""What keeping an old skill costs: of the validations of finished runs, the best new score at each part that was kept.

Only what was measured is compared, nothing is interpolated. A sweep over `craft.keep` (search space `price`) gives the
curve; the validations of a single run are points of it, too, because a run passes from the teacher to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError
from craft_ray.run.checkpoint import checkpoint_step
from craft_ray.run.folder import RunFolder
from craft_ray.run.held_out import eval_sets
from craft_ray.run.scoring import HIGHER_IS_BETTER, ratio
from craft_ray.storage.paths import StoragePath

TARGETS = (0.90, 0.95, 0.99)


@dataclass(frozen=True)
class Point:
    """A validation of a run."""

    run: RunFolder
    step: int
    kept: float
    """The old skill's score over the teacher's; of several skills the smallest."""
    bound: float | None
    """Its lower bound at `craft.keep_confidence`."""
    new: float
    """The new skill's score."""

    @property
    def name(self) -> str:
        path = self.run.path
        return f"{path.parent.name}/{path.name}" if path.parent.parent.name == "trials" else path.name

    @property
    def saved(self) -> bool:
        """Whether the run still has the checkpoint of this step."""
        folder = self.run.checkpoints
        return folder.exists() and any(checkpoint_step(path) == self.step for path in folder.glob("step_*"))


def runs_at(paths: Sequence[StoragePath]) -> list[RunFolder]:
    """The runs in these folders: runs, or sweeps with the runs of their trials.

    Raises:
        ConfigError: a folder is neither.
    """
    found: list[RunFolder] = []
    for path in paths:
        inner: list[StoragePath] = [path]
        if (path / "trials").exists():
            inner = sorted((run for trial in (path / "trials").glob("*") for run in trial.glob("seed*")), key=str)
        runs = [RunFolder(each) for each in inner if (each / "config.yaml").exists()]
        if not runs:
            raise ConfigError(f"{path} is neither a run nor a sweep: it has no config.yaml and no trials")
        found += runs
    return found


def points_of(runs: Sequence[RunFolder]) -> tuple[list[Point], str]:
    """The validations that scored both skills, and the metric of the new one.

    Raises:
        ConfigError: there is none, or the runs score different data.
    """
    scored = {repr(_scored(run.config())) for run in runs}
    if len(scored) > 1:
        raise ConfigError("the runs are validated on different data, so their scores are not comparable: name others")
    points = [
        Point(run, record["step"], record["old/ratio"], record.get("old/bound"), record["new/score"])
        for run in runs
        for record in run.read_validation()
        if record.get("old/ratio") is not None and record.get("new/score") is not None
    ]
    if not points:
        raise ConfigError(
            "no validation of these runs scored both the old and the new skill: train with validation.old, "
            "validation.new and validation.every"
        )
    return points, dict(eval_sets(runs[0].config(), "validation"))["new"].metric


def _scored(config: Experiment) -> list[Any]:
    return [(skill, eval_set.model_dump()) for skill, eval_set in eval_sets(config, "validation")]


def cheapest(points: Sequence[Point], metric: str, keep: float) -> Point | None:
    """The point with the best new score among those that kept at least this part; None if none did."""
    enough = [point for point in points if point.kept >= keep]
    return max(enough, key=lambda point: _goodness(point.new, metric), default=None)


def _goodness(new: float, metric: str) -> float:
    return new if HIGHER_IS_BETTER[metric] else -new


def cost_of_a_percent(lower: tuple[float, Point], upper: tuple[float, Point], metric: str) -> float:
    """What one percent more of the old skill costs of the new one, between two parts to keep and the best validations
    that kept them:

    cost = (best new at `lower` - best new at `upper`) / (100 (upper - lower))

    In points of the new score, which are hundredths; for perplexity in its own unit. It is never negative, because what
    keeps the upper part keeps the lower one, too.
    """
    lost = _goodness(lower[1].new, metric) - _goodness(upper[1].new, metric)
    return (lost if metric == "perplexity" else 100 * lost) / (100 * (upper[0] - lower[0]))


def price_lines(points: Sequence[Point], metric: str, targets: Sequence[float]) -> Iterator[str]:
    """A line for each part to keep, the smallest first, with what it cost of the new skill; before all but the first,
    what one percent costs from the part before it to this one."""
    best = max(points, key=lambda point: _goodness(point.new, metric))
    yield (
        f"best new {metric} of {len(points)} validations: {best.new:.3f}, at {best.kept:.1%} kept ({best.name}, step "
        f"{best.step})"
    )
    most = max(points, key=lambda point: point.kept)
    before: tuple[float, Point] | None = None
    for keep in sorted(set(targets)):
        point = cheapest(points, metric, keep)
        if point is None:
            yield f"keep {100 * keep:g}%: no validation kept so much; the most is {most.kept:.1%} at new {most.new:.3f}"
            continue
        if before is not None:
            cost = cost_of_a_percent(before, (keep, point), metric)
            words = f"{cost:.3g} of" if metric == "perplexity" else f"{cost:.2f} points of"
            yield f"  from {100 * before[0]:g}% to {100 * keep:g}%: {words} new {metric} per percent of old"
        before = keep, point
        of_best = ratio(metric, point.new, best.new)
        relative = "" if of_best is None else f", {of_best:.1%} of the best"
        least = "" if point.bound is None else f", at least {point.bound:.1%}"
        saved = "its checkpoint is there" if point.saved else "its checkpoint was not kept"
        yield (
            f"keep {100 * keep:g}%: new {metric} {point.new:.3f}{relative}; {point.kept:.1%} kept{least} "
            f"({point.name}, step {point.step}; {saved})"
        )
