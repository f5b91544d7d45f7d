"""A retention mode says how the loss of an old skill is measured. This is what a constraint asks of every mode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from craft_ray.anchors.reader import AnchorSet
from craft_ray.config import CraftConfig
from craft_ray.config.modes import Unit
from craft_ray.models.base import Model
from craft_ray.models.features import FeatureCache


class Terms(Protocol):
    """A batch of anchors: the student's inputs beside what the teacher gave on them."""

    @property
    def count(self) -> int:
        """Terms of the mean that the loss of the batch is."""
        ...

    def to(self, device: torch.device) -> Self: ...


AnchorBatch = TypeVar("AnchorBatch", bound=Terms)


class RetentionMode(ABC, Generic[AnchorBatch]):
    """One way to measure how far the student has moved on the anchors of a cache."""

    name: ClassVar[str]
    needs: ClassVar[Literal["anchors", "responses", "weights"]]
    """What a user has to give: inputs of the old skill, inputs with their right responses, or the teacher alone."""
    unit: Unit
    """Of the loss, and so of the budget."""
    model: Model
    anchors: AnchorSet
    description: str
    """What of the anchors is compared, for people."""

    @classmethod
    @abstractmethod
    def open(
        cls,
        craft: CraftConfig,
        model: Model,
        anchors: AnchorSet,
        layers: Sequence[int],
        positions: Sequence[str],
        features: FeatureCache,
    ) -> Self:
        """The mode as a run uses it.

        Args:
            layers, positions: of the cache, as far as this run anchors them.
            features: preprocessed anchors of earlier runs in this process.
        """

    @abstractmethod
    def batch(self, rows: Sequence[int]) -> AnchorBatch:
        """The anchors of these rows, on the host."""

    @abstractmethod
    def loss(self, batch: AnchorBatch) -> Tensor:
        """L_ret of a batch: a float32 scalar on the device, the mean over the batch's `count` terms."""

    @abstractmethod
    def noise_floor(self, rows: Sequence[int]) -> float:
        """The loss, in its unit, that the storage's rounding of these rows explains: a gradient of so small a loss
        has no direction."""

    @abstractmethod
    def check_untouched(self, rows: Sequence[int], batch_size: int) -> None:
        """Step 0 is a test: an untouched student gives what the teacher gave, within the storage's precision.

        It runs in the mode in which training runs, so dropout that is left on is found here.

        Raises:
            CacheRefused: it does not; preprocessing, dropout, layers or the teacher differ.
        """


def batches_of(rows: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """The rows in batches; the last one may be smaller."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
