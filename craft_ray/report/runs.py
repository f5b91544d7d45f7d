"""The runs of a report, read from their folders, and the check that they are comparable."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError
from craft_ray.report.arms import ArmStyle, styles_of
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import Record
from craft_ray.storage.paths import StoragePath


@dataclass(frozen=True)
class FinishedRun:
    """Everything that a run left behind except its weights."""

    folder: RunFolder
    config: Experiment
    result: dict[str, Any]
    """Its result.json, with the `path` of its folder."""
    metrics: list[Record]
    environment: dict[str, Any] | None
    """Its env.json; None if the folder has none."""
    teacher: str | None
    """Hash of the weights that it started from; None if the folder does not record it."""
    style: ArmStyle
    """How its arm is drawn."""

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def arm(self) -> str:
        return self.config.arm

    @property
    def seed(self) -> int:
        return self.config.seed


def read_runs(folders: Sequence[RunFolder]) -> list[FinishedRun]:
    """The runs by arm and seed, variants in the order in which they are given.

    Raises:
        ConfigError: none is given, one is not finished, two differ in teacher, evaluation or cache, or there are too
            many variants.
    """
    if not folders:
        raise ConfigError("a report needs at least one run directory")
    configs = [folder.config() for folder in folders]
    styles = styles_of(config.arm for config in configs)
    order = list(styles)
    runs = [_read(folder, config, styles[config.arm]) for folder, config in zip(folders, configs, strict=True)]
    runs.sort(key=lambda run: (order.index(run.arm), run.seed))
    _check_same(runs, "teacher", lambda run: run.teacher)
    _check_same(runs, "anchor cache", lambda run: run.result.get("cache"))
    for skill in ("old", "new"):
        for part, what in (("metric", "metric"), ("samples", "number of held-out samples")):
            _check_same(runs, f"{what} of the {skill} skill", _scored(skill, part))
    return runs


def _read(folder: RunFolder, config: Experiment, style: ArmStyle) -> FinishedRun:
    result = folder.finished()
    if result is None:
        raise ConfigError(
            f"{folder.path} is not a finished run, it has no result.json: resume it with train --resume {folder.path}"
        )
    teacher = _json(folder.path / "teacher.json")
    return FinishedRun(
        folder,
        config,
        {**result, "path": str(folder.path)},
        folder.read_metrics(),
        _json(folder.path / "env.json"),
        None if teacher is None else teacher["weights"],
        style,
    )


def _json(path: StoragePath) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _scored(skill: str, part: str) -> Callable[[FinishedRun], Any]:
    """A part of a skill's score; of several old skills, each one's."""

    def of(run: FinishedRun) -> Any:
        several = run.result.get("skills")
        if skill == "old" and several:
            return {name: found.get(part) for name, found in several.items()}
        return run.result[skill].get(part)

    return of


def _check_same(runs: Sequence[FinishedRun], what: str, of: Callable[[FinishedRun], Any]) -> None:
    """Raise if two runs have different values. A run without a value contradicts no other."""
    having = [run for run in runs if of(run) is not None]
    for run in having[1:]:
        if of(run) != of(having[0]):
            raise ConfigError(
                f"the runs are not comparable: the {what} is {of(having[0])} in {having[0].folder.path}, but {of(run)} "
                f"in {run.folder.path}"
            )
