"""The processes of a build.

Without `anchors.readers` a teacher does everything: it reads its rows, runs the model on them and writes the shard.
With them the three stages are processes of their own, and Ray Data passes row groups from one to the next: a teacher
computes while readers decode the images of the next group, and while a finished shard is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch

from craft_ray.anchors.build import build_shard, prepare, write_shard
from craft_ray.anchors.manifest import SHARDS, Plan
from craft_ray.anchors.teacher import Teacher
from craft_ray.config import Experiment, parse_config, read_yaml
from craft_ray.data.skills import open_anchor_source
from craft_ray.data.source import Source
from craft_ray.errors import ConfigError, CraftError
from craft_ray.models import load_model
from craft_ray.models.base import Model
from craft_ray.models.weightless import received
from craft_ray.quiet import quiet_libraries
from craft_ray.storage.paths import storage_path


def message(name: str, value: Any = None, error: CraftError | None = None) -> dict[str, Any]:
    """What a process passes on about (a part of) a shard, as a batch of one row.

    A user's mistake is a value: as an exception it would arrive wrapped in Ray's text.
    """
    column = np.empty(1, dtype=object)
    column[0] = value
    text, code = ("", 0) if error is None else (error.message, error.exit_code)
    return {"name": [name], "value": column, "error": [text], "exit_code": [code]}


def failed(batch: dict[str, Any]) -> CraftError | None:
    """The first mistake in what an earlier process passed on."""
    for text, code in zip(batch["error"], batch["exit_code"], strict=True):
        if text:
            return CraftError.from_message(str(text), int(code))
    return None


class TeacherProcess:
    """A teacher in a separate process.

    The first call loads the model, not the constructor: what the constructor raises would end the build in Ray's text.

    Args:
        tell: receives the name of what is computed and how many of its rows the teacher has run on.
    """

    def __init__(self, config: str, plan: str, tell: Callable[[str, float], None]) -> None:
        self.tell = tell
        self.plan = Plan.model_validate_json(plan)
        self.experiment = parse_config(read_yaml(config), "config")
        assert self.experiment.anchors is not None
        self.anchors = self.experiment.anchors

    @cached_property
    def teacher(self) -> Teacher:
        quiet_libraries()
        torch.set_num_threads(self.anchors.threads_per_actor)
        wanted, present = self.anchors.gpus_per_actor, torch.cuda.device_count()
        if wanted > present:
            raise ConfigError(
                f"anchors.gpus_per_actor is {wanted:g}, but the teacher's process has {present} GPUs: set it to at "
                f"most that"
            )
        device = torch.device("cuda" if wanted else "cpu")
        gpus = max(1, int(wanted))
        model = load_model(self.experiment.model, self.experiment.train.precision, device, gpus=gpus)
        return Teacher(model, self.plan.identity.schema, self.anchors, self._passed)

    def _passed(self, rows: float) -> None:
        self._rows += rows
        self.tell(self._name, self._rows)

    def begin(self, name: str) -> None:
        self._name, self._rows = name, 0.0


class ShardWriter(TeacherProcess):
    """A teacher that reads its rows itself; each call writes one shard."""

    @cached_property
    def source(self) -> Source:
        return open_anchor_source(self.anchors, self.experiment.skills)

    def write(self, name: str, rows: range) -> None:
        self.begin(name)
        build_shard(self.teacher, self.source, rows, shard_path(self.experiment, name))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        name, rows = _rows(batch)
        try:
            self.write(name, rows)
        except CraftError as error:
            return message(name, error=error)
        return message(name)


class AnchorReader:
    """The first of three stages: reads and preprocesses the rows of a group.

    Args:
        model: what `without_weights` made of the teacher.
    """

    def __init__(self, config: str, model: bytes) -> None:
        self._sent = model
        self.experiment = parse_config(read_yaml(config), "config")

    @cached_property
    def model(self) -> Model:
        quiet_libraries()
        torch.set_num_threads(1)
        model = received(self._sent)
        assert isinstance(model, Model)
        return model

    @cached_property
    def source(self) -> Source:
        assert self.experiment.anchors is not None
        return open_anchor_source(self.experiment.anchors, self.experiment.skills)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        name, rows = _rows(batch)
        try:
            return message(name, (rows.start, prepare(self.model, self.source, rows)))
        except CraftError as error:
            return message(name, error=error)


class GroupTeacher(TeacherProcess):
    """The second stage: runs the teacher on a group that was read."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        name = str(batch["name"][0])
        if error := failed(batch):
            return message(name, error=error)
        start, anchors = batch["value"][0]
        if not anchors.samples:
            return message(name)
        self.begin(f"{name}/{start}")
        try:
            return message(name, self.teacher.table(anchors))
        except CraftError as error:
            return message(name, error=error)


class GroupWriter:
    """The third stage: writes the groups of one shard, in their order."""

    def __init__(self, config: str, plan: str) -> None:
        self.experiment = parse_config(read_yaml(config), "config")
        self.schema = Plan.model_validate_json(plan).identity.schema

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (name,) = {str(name) for name in batch["name"]}
        if error := failed(batch):
            return message(name, error=error)
        tables = (table for table in batch["value"] if table is not None)
        try:
            write_shard(shard_path(self.experiment, name), self.schema, tables)
        except CraftError as error:
            return message(name, error=error)
        return message(name)


def shard_path(experiment: Experiment, name: str) -> Any:
    assert experiment.craft.anchor_cache_dir is not None
    return storage_path(experiment.craft.anchor_cache_dir) / SHARDS / name


def _rows(batch: dict[str, Any]) -> tuple[str, range]:
    return str(batch["name"][0]), range(int(batch["start"][0]), int(batch["stop"][0]))
