"""The training data of the new skill, as the steps of a run read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from craft_ray.config import Experiment, TaskConfig
from craft_ray.data.source import Source
from craft_ray.data.streaming import StreamedSource
from craft_ray.data.task import open_task, rows_of, sampler_of
from craft_ray.errors import ConfigError
from craft_ray.models.base import Batch, Features, Model
from craft_ray.models.capabilities import TokenModel, packing_model
from craft_ray.models.features import FeatureCache
from craft_ray.pace import Report, unreported
from craft_ray.retention.mode import split
from craft_ray.run.rows import Rows
from craft_ray.run.scoring import source_identity
from craft_ray.run.selective import TokenMask
from craft_ray.workers import Workers

TASK_STREAM = 0
"""Keeps the order of the task's samples apart from that of the anchors under one seed."""
BOUNDARIES = 64
"""Samples, spread over the data, whose boundary of prompt and response is inspected before a run."""


class TaskData:
    """The samples of the new skill, in the order of the steps.

    Args:
        features: preprocessed samples of earlier runs in this process.
        teacher: the model before fine-tuning, for `train.mask_loss_above`.
        report: receives how far its pass over the samples is.

    Raises:
        ConfigError: the model cannot read the data, or there are no responses to learn.
    """

    def __init__(
        self,
        config: Experiment,
        model: Model,
        workers: Workers,
        features: FeatureCache,
        teacher: Callable[[], Model],
        report: Report = unreported,
    ) -> None:
        self.source = open_task(config.task)
        self._streamed = isinstance(self.source, StreamedSource)
        if isinstance(self.source, StreamedSource):
            self.source = self.source.in_order_of(config.seed, TASK_STREAM)
        model.check_source(self.source)
        if not self.source.has_responses:
            raise ConfigError("task.columns.response names no column: fine-tuning needs responses")
        self._model = model
        self._collate = _packing(model) if config.train.pack else model.collate
        self._workers = workers
        self._accumulate = config.train.accumulate
        self._sampler = sampler_of(config.task, self.source, config.train.batch_size, config.seed, TASK_STREAM)
        # A row of a stream does not come again before all others: it is not kept.
        samples = TaskSamples(config.task, model, self.source)
        self._kept = None if self._streamed else features.source(samples, *source_identity(config.task, model))
        self._features: Callable[[int], Features] = samples if self._kept is None else self._kept
        self._seed = config.seed
        self.mask: TokenMask | None = None
        threshold = config.train.mask_loss_above
        if threshold is not None and self._streamed:
            raise ConfigError(
                f"train.mask_loss_above {threshold:g} needs the teacher's loss on every sample before training, and "
                f"task.streaming reads them as training goes: leave out one of the two"
            )
        if threshold is not None:
            size = config.train.batch_size
            self.mask = TokenMask(teacher(), self._features, len(self.source), threshold, size, workers, report)

    @property
    def count(self) -> int | None:
        """How many samples there are; None for a stream."""
        return None if self._streamed else len(self.source)

    @property
    def size(self) -> str:
        """How many samples there are, in words."""
        return "a stream of samples" if self.count is None else f"{self.count} samples"

    def batches(self, step: int) -> list[Batch]:
        """This worker's micro-batches of a step (from 0), on the host."""
        rows = self._sampler.local_batch(step, self._workers.rank, self._workers.world_size)
        return [self._collate(self._samples(part)) for part in split(rows, self._accumulate)]

    def described(self) -> list[str]:
        """What there is to report about the samples before a run."""
        streamed = (
            f"the new skill is a stream: its first {self._rows} samples in the order of the seed are checked before "
            f"the first step, and a resumed run reads again what comes before its step"
        )
        lines = [
            streamed if self._streamed else None,
            self.boundary_merges(),
            None if self.mask is None else self.mask.described(),
        ]
        return [line for line in lines if line is not None]

    def boundary_merges(self) -> str | None:
        """Where prompt and response are tokenised apart, although together they would have other tokens: a line to
        report; None if it happens nowhere."""
        model, rows = self._model, self._rows
        count = min(BOUNDARIES, rows)
        if not isinstance(model, TokenModel) or self.source.features is not None:  # a frame has no text to merge
            return None
        samples = [self.source[i * rows // count] for i in range(count)]
        merged = [sample for sample in samples if sample.response is not None and model.boundary_merges(sample)]
        if not merged:
            return None
        return (
            f"in {len(merged)} of {count} samples of the new skill a token would extend over the boundary of prompt "
            f"and response, so they are tokenised apart (first: {merged[0].where}): does a space belong to the "
            f"response?"
        )

    def rows(self) -> Rows:
        """Every row, to be checked before the first step."""
        how: list[object] = ["task", self._model.sample_fingerprint()]
        if self._streamed:
            how.append(self._seed)  # decides which rows come first
        content = self.source.fingerprint if self._workers.rank == 0 else ""
        return Rows("task", self._rows, content, self._features, self.source.place, how, self._model.threaded)

    @property
    def _rows(self) -> int:
        return rows_of(self.source)

    def _samples(self, rows: Sequence[int]) -> list[Features]:
        found = [self._features(row) for row in rows] if self._kept is None else self._kept.batch(rows)
        if self.mask is None:
            return found
        return [self.mask(row, features) for row, features in zip(rows, found, strict=True)]


def _packing(model: Model) -> Callable[[Sequence[Features]], Batch]:
    packed = packing_model(model)
    try:
        packed.check_packing()
    except ValueError as error:
        raise ConfigError(f"train.pack is true, but {error}: set train.pack=false, which pads") from None
    return packed.packed_batch


@dataclass(frozen=True)
class TaskSamples:
    """Preprocesses a sample of the new skill by its row. Another process opens the data itself."""

    config: TaskConfig
    model: Model
    source: Source

    def __call__(self, row: int) -> Features:
        return self.model.preprocess_task(self.source[row])

    def __reduce__(self) -> tuple[Callable[[TaskConfig, Model], TaskSamples], tuple[TaskConfig, Model]]:
        return _opened, (self.config, self.model)


def _opened(config: TaskConfig, model: Model) -> TaskSamples:
    return TaskSamples(config, model, open_task(config))
