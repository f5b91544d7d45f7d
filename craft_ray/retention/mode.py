"""A retention mode defines how the loss of an old skill is measured. This is the interface of every mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from craft_ray.anchors.reader import AnchorSet
from craft_ray.config import CraftConfig
from craft_ray.config.modes import Unit
from craft_ray.models.base import Model
from craft_ray.models.features import FeatureCache
from craft_ray.pace import Report, unreported


class Terms(Protocol):
    """A batch of anchors: the student's inputs, and the teacher's outputs for them."""

    @property
    def count(self) -> int:
        """Number of terms that the batch's mean loss averages."""
        ...

    def to(self, device: torch.device) -> Self: ...


AnchorBatch = TypeVar("AnchorBatch", bound=Terms)


@dataclass(frozen=True)
class Opening:
    """What a run opens its retention mode with."""

    craft: CraftConfig
    model: Model
    cache: AnchorSet | None
    """None for a mode whose teacher stores nothing."""
    layers: Sequence[int]
    positions: Sequence[str]
    """Layers and positions of the cache that this run anchors."""
    features: FeatureCache
    """Preprocessed anchors of earlier runs in this process."""
    teacher: Callable[[], Model]
    """The model before fine-tuning: the student itself before its first step, and in a resumed run one that is loaded
    for it."""
    report: Report = unreported
    """Receives how far a pass over the anchors is."""

    @property
    def anchors(self) -> AnchorSet:
        """The cache of a mode that needs one."""
        assert self.cache is not None, "the mode stores something, so it is opened with a cache"
        return self.cache


class RetentionMode(ABC, Generic[AnchorBatch]):
    """One way to measure how far the student has moved: on the anchors of a cache, or in its weights."""

    name: ClassVar[str]
    unit: Unit
    """The unit of the loss, and so of the budget."""
    model: Model
    description: str
    """What is compared, for messages."""
    cache: str | None
    """Fingerprint of the anchor cache; None for a mode without one."""
    fingerprint: str
    """Identity of what the student is held to: the cache's or, without one, the teacher's."""

    @abstractmethod
    def split(self, holdout: float, skill: str | None = None) -> tuple[list[int], list[int]]:
        """The rows to train on, and those held out, which are none if the loss is not a mean over anchors."""

    @classmethod
    @abstractmethod
    def open(cls, run: Opening) -> Self:
        """The mode as a run uses it."""

    @abstractmethod
    def batch(self, rows: Sequence[int]) -> AnchorBatch:
        """What the loss takes of these rows, on the host."""

    @abstractmethod
    def loss(self, batch: AnchorBatch) -> Tensor:
        """L_ret of a batch: a float32 scalar on the device, the mean over the batch's `count` terms."""

    @abstractmethod
    def noise_floor(self, rows: Sequence[int]) -> float:
        """The loss, in its unit, that rounding these rows for storage can cause. The gradient of so small a loss has
        no meaningful direction."""

    @abstractmethod
    def check_untouched(self, rows: Sequence[int], batch_size: int) -> None:
        """Check at step 0 that the untouched student reproduces the teacher, within the storage's precision.

        The student stays in training mode, so dropout that was left on is found here.

        Raises:
            CacheRefused: it does not; preprocessing, dropout, layers or the teacher differ.
        """


class SampleMode(RetentionMode[AnchorBatch]):
    """A mode whose loss is a mean over terms of single anchors, so that one batch may hold anchors of several
    skills."""

    anchors: AnchorSet

    @property
    def cache(self) -> str:  # type: ignore[override]
        return self.anchors.fingerprint

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        return self.anchors.fingerprint

    def split(self, holdout: float, skill: str | None = None) -> tuple[list[int], list[int]]:
        return self.anchors.split(holdout, skill=skill)

    @abstractmethod
    def sample_sums(self, batch: AnchorBatch) -> Tensor:
        """The sum of each anchor's terms, [B] in float32 on the device; `loss` is their sum over `count`."""

    @abstractmethod
    def sample_counts(self, batch: AnchorBatch) -> Tensor:
        """The number of each anchor's terms, [B], where the batch is."""


Row = TypeVar("Row")


def batches_of(rows: Sequence[Row], batch_size: int) -> list[Sequence[Row]]:
    """The rows in batches; the last one may be smaller."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def split(rows: Sequence[Row], parts: int) -> list[Sequence[Row]]:
    """Micro-batches of equal size."""
    return batches_of(rows, len(rows) // parts)
