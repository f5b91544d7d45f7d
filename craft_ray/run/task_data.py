"""The training data of the new skill, as the steps of a run read them."""

from __future__ import annotations

from craft_ray.config import Experiment
from craft_ray.data.sampler import StepSampler
from craft_ray.data.source import open_source
from craft_ray.errors import ConfigError
from craft_ray.models.base import Batch, Features, Model
from craft_ray.models.features import FeatureCache
from craft_ray.retention.constraint import split
from craft_ray.run.scoring import source_identity
from craft_ray.workers import Workers

TASK_STREAM = 0
"""Keeps the order of the task's samples apart from that of the anchors under one seed."""


class TaskData:
    """The samples of the new skill, in the order of the steps.

    Args:
        features: preprocessed samples of earlier runs in this process.

    Raises:
        ConfigError: the model cannot read the data, or there are no responses to learn.
    """

    def __init__(self, config: Experiment, model: Model, workers: Workers, features: FeatureCache) -> None:
        self.source = open_source(config.task, "task")
        model.check_source(self.source)
        if not self.source.has_responses:
            raise ConfigError("task.columns.response names no column: fine-tuning needs responses")
        self._model = model
        self._workers = workers
        self._accumulate = config.train.accumulate
        self._sampler = StepSampler(len(self.source), config.train.batch_size, config.seed, TASK_STREAM)
        self._features = features.source(self._preprocess, *source_identity(config.task, model))

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, step: int) -> list[Batch]:
        """This worker's micro-batches of a step (from 0), on the host."""
        rows = self._sampler.local_batch(step, self._workers.rank, self._workers.world_size)
        return [self._model.collate([self._features(row) for row in part]) for part in split(rows, self._accumulate)]

    def _preprocess(self, row: int) -> Features:
        return self._model.preprocess_task(self.source[row])
