"""What data a run used and for what, and which of it the public can find."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from craft_ray.config import DataConfig, EvalSet, Experiment, HarnessEvalSet, RolloutEvalSet, TableData
from craft_ray.config.mixture import Mixture
from craft_ray.config.skills import SkillConfig

LOCAL = ("/", "s3://", "~")
"""How the path of what is not on the hub begins: a config holds local paths as absolute ones."""


@dataclass(frozen=True)
class DataUse:
    """A data set, or a task in a simulator, and what it was used for."""

    purpose: str
    skill: str
    """`new`, `old`, or the name of one of several old skills."""
    path: str
    """The name on the hub, where it is public; otherwise only the last part of the path, or the names of tasks."""
    public: bool
    scored: bool
    """Whether the skill was scored on it, rather than trained or kept by it."""
    split: str | None = None
    limit: int | None = None


def is_local(path: str) -> bool:
    """Whether a path in a config is a file or a folder, and not a name on the hub."""
    return path.startswith(LOCAL)


def last_part(path: str) -> str:
    return PurePosixPath(path).name


def data_uses(config: Experiment) -> list[DataUse]:
    """Everything that a run was trained on, anchored at and scored on, in this order."""
    return list(_uses(config))


def _uses(config: Experiment) -> Iterator[DataUse]:
    task = config.task
    for source in [mixed.data for mixed in task.mix] if isinstance(task, Mixture) else [task]:
        yield _use("training data of the new skill", "new", source)
    if config.anchors is not None and config.anchors.source is not None:
        yield _use("anchors of the old skill (inputs without labels)", "old", config.anchors.source)
    for name, skill in config.skills.items():
        if skill.anchors is not None:
            yield _use(f"anchors of the old skill {name} (inputs without labels)", name, skill.anchors)
    for name, scored in _scored(config):
        purpose = f"scores of the {name} skill" if name in ("old", "new") else f"scores of the old skill {name}"
        if isinstance(scored, RolloutEvalSet):
            yield DataUse(purpose, name, f"{scored.rollout.env}/{scored.rollout.task}", public=False, scored=True)
        elif isinstance(scored, HarnessEvalSet):
            tasks = ", ".join(scored.harness.tasks)
            yield DataUse(purpose, name, tasks, public=False, scored=True, limit=scored.harness.limit)
        elif scored is not None:
            yield _use(purpose, name, scored.data, scored=True)


def _scored(config: Experiment) -> Iterator[tuple[str, EvalSet | None]]:
    skills: dict[str, SkillConfig] = dict(config.skills)
    if skills:
        yield from ((name, skill.evaluation) for name, skill in skills.items())
    else:
        yield "old", config.evaluation.old
    yield "new", config.evaluation.new


def _use(purpose: str, skill: str, data: DataConfig, scored: bool = False) -> DataUse:
    public = not is_local(data.path)
    return DataUse(
        purpose,
        skill,
        data.path if public else last_part(data.path),
        public,
        scored,
        data.split if public and isinstance(data, TableData) else None,
        data.limit,
    )
