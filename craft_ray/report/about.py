"""What was compared: the skills in words, the model, the sizes of the sets, the date."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from craft_ray.config import EvalSet, LeRobotData, Mixture, RolloutEvalSet, SampleEvalSet
from craft_ray.report.runs import FinishedRun
from craft_ray.report.wording import METRICS
from craft_ray.storage.last import LAST

SAVED_AS = (("checkpoints", LAST, "model"), ("model",))
"""Ends of a path that say nothing about the model in it."""


def facts(runs: Sequence[FinishedRun]) -> list[tuple[str, str]]:
    """`(what, words)` in the order in which a reader asks."""
    return [(what, words) for what, words in _facts(runs) if words]


def _facts(runs: Sequence[FinishedRun]) -> Iterator[tuple[str, str]]:
    run = runs[0]
    config, evaluation = run.config, run.config.evaluation
    names = ", ".join(config.skills)
    yield "Old skill", config.about.old or names or described(evaluation.old, run.result["old"].get("samples"))
    yield "New skill", config.about.new or described(evaluation.new, run.result["new"].get("samples"))
    yield "Model", model_name(config.model.path)
    yield "Trained on", _task(run)
    yield "Anchors", _anchors(runs)
    yield "Scored on", _scored(run)
    yield "Date", _date(runs)


def described(scored: EvalSet | None, samples: int | None) -> str:
    """A skill by the data that it is scored on."""
    if scored is None or samples is None:
        return ""
    if isinstance(scored, RolloutEvalSet):
        return scored.rollout.prompt or scored.rollout.task
    if isinstance(scored, SampleEvalSet):
        where = PurePosixPath(scored.data.path).name
    else:
        where = ", ".join(scored.harness.tasks)
    return f"{METRICS[scored.metric].removesuffix(' ↓')} on {where}"


def model_name(path: str) -> str:
    """A model by its name on the hub, or by the folder that it is known by."""
    parts = PurePosixPath(path).parts
    if parts[:1] != ("/",):
        return path
    for end in SAVED_AS:
        if parts[-len(end) :] == end and len(parts) > len(end) + 1:
            return parts[-len(end) - 1]
    return parts[-1]


def _task(run: FinishedRun) -> str:
    """The samples of the new skill, where the run has counted them."""
    count, task = run.result.get("task_samples"), run.config.task
    paths = [part.data.path for part in task.mix] if isinstance(task, Mixture) else [task.path]
    names = ", ".join(PurePosixPath(path).name for path in paths)
    what = "frames" if isinstance(task, LeRobotData) else "samples"
    steps = f"{run.config.train.steps} steps of {run.config.train.batch_size}"
    return f"{names}, {steps}" if count is None else f"{count} {what} of {names}, {steps}"


def _anchors(runs: Sequence[FinishedRun]) -> str:
    for run in runs:
        skills = [found for found in run.result.get("skills", {}).values() if "anchors" in found] or [run.result]
        trained, held_out = (sum(found.get(key, 0) for found in skills) for key in ("anchors", "heldout_anchors"))
        if trained:
            return f"{trained} for training, {held_out} held out"
    return ""


def _scored(run: FinishedRun) -> str:
    several = run.result.get("skills", {})
    scored = {**({} if several else {"old": run.result["old"]}), **several, "new": run.result["new"]}
    return ", ".join(f"{found['samples']} of {skill}" for skill, found in scored.items() if found.get("samples"))


def _date(runs: Sequence[FinishedRun]) -> str:
    """When the runs began, as their environments say."""
    days = [run.environment["started"][:10] for run in runs if run.environment and "started" in run.environment]
    return "" if not days else min(days) if min(days) == max(days) else f"{min(days)} to {max(days)}"
