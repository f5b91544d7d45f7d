"""Anchors as batches: the student's inputs beside what the teacher gave on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from craft_ray.anchors.reader import AnchorSet
from craft_ray.config import RetentionMode
from craft_ray.errors import CacheRefused
from craft_ray.method.pooling import Vectors
from craft_ray.models.base import Batch, Features, Model
from craft_ray.models.capabilities import tensor_model, token_model
from craft_ray.models.features import FeatureCache, Shelves
from craft_ray.retention.losses import hidden_loss


@dataclass(frozen=True)
class AnchorBatch:
    """Some anchors: inputs for the student, and the teacher's vectors in mode `hidden`."""

    inputs: Batch
    teacher: Vectors | None

    @property
    def count(self) -> int:
        """Terms of the mean of the retention loss: samples for `hidden`, suffix tokens for `token_ce`."""
        return self.inputs.tokens if self.teacher is None else self.inputs.samples

    def to(self, device: torch.device) -> AnchorBatch:
        teacher = self.teacher
        if teacher is not None:
            teacher = Vectors(
                teacher.values_BLVD.to(device, non_blocking=True), teacher.valid_BV.to(device, non_blocking=True)
            )
        return AnchorBatch(self.inputs.to(device), teacher)


class AnchorBatches:
    """Makes batches of anchors for one student, mode, choice of layers and positions.

    Args:
        layers: resolved indices, a subset of the cache's.
        positions: a subset of the cache's.
        shelves: preprocessed anchors of runs before this one.
    """

    def __init__(
        self,
        model: Model,
        anchors: AnchorSet,
        mode: RetentionMode,
        layers: Sequence[int],
        positions: Sequence[str],
        shelves: Shelves | None = None,
    ) -> None:
        self.model = model
        self.anchors = anchors
        self.mode = mode
        self.layers = tuple(layers)
        self.positions = tuple(positions)
        self._layer_rows = [anchors.identity.layers.index(k) for k in layers]
        self._with_suffix = mode == "token_ce" or "suffix" in positions
        how = (anchors.fingerprint, f"suffix {self._with_suffix}", model.preprocessor_fingerprint())
        self._features = FeatureCache(self._preprocess, (shelves or Shelves()).of(*how))

    def _preprocess(self, row: int) -> Features:
        suffix = self.anchors.suffix(row) if self._with_suffix else None
        if self.anchors.identity.inputs == "tensors":
            input_ids, pixels = self.anchors.tensors(row)
            return tensor_model(self.model).from_tensors(input_ids, pixels, suffix)
        sample = self.anchors.sample(row)
        return self.model.preprocess(sample) if suffix is None else token_model(self.model).preprocess(sample, suffix)

    def batch(self, rows: Sequence[int]) -> AnchorBatch:
        """The anchors of these rows, on the host."""
        features = [self._features[row] for row in rows]
        if self.mode == "token_ce":
            return AnchorBatch(self.model.collate(features), None)
        inputs = self.model.collate(features, self.positions)
        teacher = self.teacher_vectors(rows)
        assert inputs.pooling is not None
        if not torch.equal(inputs.pooling.valid_BV, teacher.valid_BV):
            ours, theirs = inputs.pooling.valid_BV.sum(1).tolist(), teacher.valid_BV.sum(1).tolist()
            row = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), 0)
            raise CacheRefused(
                f"anchor {self.anchors.id(rows[row])} has {theirs[row]} vectors in the cache, this run's preprocessing "
                f"finds {ours[row]}: the cache was built with another preprocessor, build it again"
            )
        return AnchorBatch(inputs, teacher)

    def teacher_vectors(self, rows: Sequence[int]) -> Vectors:
        """The cached vectors of these rows, [B, L, V, D], in the storage type."""
        values, valid = zip(*(self.anchors.vectors(rows, p) for p in self.positions), strict=True)
        values_BVLD = np.concatenate(values, 1) if len(values) > 1 else values[0]
        if len(self._layer_rows) < values_BVLD.shape[2]:
            values_BVLD = values_BVLD[:, :, self._layer_rows]
        values_BLVD = torch.from_numpy(np.ascontiguousarray(values_BVLD.swapaxes(1, 2)))
        return Vectors(values_BLVD, torch.from_numpy(np.concatenate(valid, 1)))

    def student_vectors(self, batch: AnchorBatch) -> Vectors:
        """The model's own vectors on a batch."""
        assert batch.inputs.pooling is not None
        return batch.inputs.pooling(self.model.hidden_states(batch.inputs, self.layers))

    def loss(self, batch: AnchorBatch, loss_type: str) -> Tensor:
        """L_ret of a batch: float32, on the device."""
        if batch.teacher is None:
            return token_model(self.model).token_loss(batch.inputs)
        return hidden_loss(self.student_vectors(batch), batch.teacher, loss_type)
