"""Retention mode `hidden`: distance of the student's hidden states from the teacher's cached ones.

The distances are in `craft_ray/method/distance.py`. Every sample has the same weight, so the mean over workers is the
mean over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from craft_ray.anchors.reader import AnchorSet
from craft_ray.anchors.schema import NOISE_FLOOR, STEP0_TOLERANCE
from craft_ray.config.modes import RETENTION_MODES
from craft_ray.errors import CacheRefused
from craft_ray.method.distance import hidden_loss, hidden_losses
from craft_ray.method.pooling import Vectors
from craft_ray.models.base import Batch, Model
from craft_ray.models.features import FeatureCache
from craft_ray.retention.inputs import AnchorInputs
from craft_ray.retention.mode import Opening, SampleMode, batches_of


@dataclass(frozen=True)
class HiddenBatch:
    """Prompts, and the teacher's vectors for them."""

    inputs: Batch
    teacher: Vectors

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.inputs.samples

    def to(self, device: torch.device) -> HiddenBatch:
        values_BLVD = self.teacher.values_BLVD.to(device, non_blocking=True)
        valid_BV = self.teacher.valid_BV.to(device, non_blocking=True)
        return HiddenBatch(self.inputs.to(device), Vectors(values_BLVD, valid_BV))


class Hidden(SampleMode[HiddenBatch]):
    """Keeps the student's hidden states close to the teacher's.

    Args:
        layers: resolved indices, a subset of the cache's.
        positions: a subset of the cache's.
    """

    name: ClassVar[str] = "hidden"

    def __init__(
        self,
        model: Model,
        anchors: AnchorSet,
        layers: Sequence[int],
        positions: Sequence[str],
        loss_type: str = "relative_mse",
        features: FeatureCache | None = None,
    ) -> None:
        self.model = model
        self.anchors = anchors
        self.layers = tuple(layers)
        self.positions = tuple(positions)
        self.loss_type = loss_type
        self.unit = RETENTION_MODES[self.name].unit(loss_type)
        self.description = f"layers {list(self.layers)} at {', '.join(self.positions)}, {loss_type}"
        self._layer_rows = [anchors.identity.layers.index(k) for k in layers]
        self._inputs = AnchorInputs(model, anchors, with_suffix="suffix" in positions, cache=features)

    @classmethod
    def open(cls, run: Opening) -> Self:
        return cls(run.model, run.anchors, run.layers, run.positions, run.craft.loss_type, run.features)

    def batch(self, rows: Sequence[int]) -> HiddenBatch:
        """The anchors of these rows, on the host.

        Raises:
            CacheRefused: this run's preprocessing yields other vectors than the cache holds.
        """
        inputs = self._inputs.batch(rows, self.positions)
        teacher = self.teacher_vectors(rows)
        self._inputs.check_counts(rows, inputs, teacher.valid_BV, "vectors")
        return HiddenBatch(inputs, teacher)

    def teacher_vectors(self, rows: Sequence[int]) -> Vectors:
        """The cached vectors of these rows, [B, L, V, D], in the storage type."""
        values, valid = zip(*(self.anchors.vectors(rows, p) for p in self.positions), strict=True)
        values_BVLD = np.concatenate(values, 1) if len(values) > 1 else values[0]
        if len(self._layer_rows) < values_BVLD.shape[2]:
            values_BVLD = values_BVLD[:, :, self._layer_rows]
        values_BLVD = torch.from_numpy(np.ascontiguousarray(values_BVLD.swapaxes(1, 2)))
        return Vectors(values_BLVD, torch.from_numpy(np.concatenate(valid, 1)))

    def student_vectors(self, batch: HiddenBatch) -> Vectors:
        """The student's vectors for a batch."""
        assert batch.inputs.pooling is not None
        return batch.inputs.pooling(self.model.hidden_states(batch.inputs, self.layers))

    def loss(self, batch: HiddenBatch) -> Tensor:
        return hidden_loss(self.student_vectors(batch), batch.teacher, self.loss_type)

    def sample_sums(self, batch: HiddenBatch) -> Tensor:
        return hidden_losses(self.student_vectors(batch), batch.teacher, self.loss_type)

    def sample_counts(self, batch: HiddenBatch) -> Tensor:
        return torch.ones(batch.count, dtype=torch.int64)

    def noise_floor(self, rows: Sequence[int]) -> float:
        """Rounding with a relative mean square of r moves a vector t by a squared distance of r |t|^2. This bounds the
        others: mse by r |t|^2 / D, l1 by the root of that (mean |x| <= sqrt(mean x^2)), cosine by r / 2, plus
        float32's rounding of the difference of two numbers near 1."""
        relative = NOISE_FLOOR[self.anchors.identity.rounding]
        if self.loss_type == "relative_mse":
            return relative
        if self.loss_type == "cosine":
            return relative / 2 + torch.finfo(torch.float32).eps
        teacher = self.teacher_vectors(rows)
        square_BLV = teacher.values_BLVD.double().square().mean(-1)
        mean_square = float(square_BLV.transpose(1, 2)[teacher.valid_BV].mean())
        return relative * mean_square if self.loss_type == "mse" else math.sqrt(relative * mean_square)

    @torch.no_grad()
    def check_untouched(self, rows: Sequence[int], batch_size: int) -> None:
        identity, total = self.anchors.identity, 0.0
        for part in batches_of(rows, batch_size):
            batch = self.batch(part).to(self.model.device)
            total += hidden_loss(self.student_vectors(batch), batch.teacher).item() * batch.count
        loss = total / len(rows)
        tolerance = STEP0_TOLERANCE[identity.rounding, identity.precision]
        if not loss <= tolerance:
            raise CacheRefused(
                f"the untouched student is {loss:.2e} away from the cached teacher (relative mean square), "
                f"{identity.rounding} storage explains {tolerance:.0e}: {self.anchors.remedy}"
            )
