"""Retention mode `hidden`: distance of the student's hidden states from the teacher's cached ones.

Mean over samples, of the mean over layers and vectors, of a distance d(student, teacher), computed in float32:

    relative_mse   |s - t|^2 / |t|^2          in units of the teacher's own size, as is epsilon
    mse            |s - t|^2 / D
    cosine         1 - <s, t> / (|s| |t|)
    l1             |s - t|_1 / D

Every sample has the same weight however many vectors it has, so the mean over workers is the mean over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from craft_ray.anchors.reader import AnchorSet
from craft_ray.anchors.schema import NOISE_FLOOR, STEP0_TOLERANCE
from craft_ray.config import CraftConfig
from craft_ray.config.modes import RETENTION_MODES
from craft_ray.errors import CacheRefused
from craft_ray.method.pooling import Vectors
from craft_ray.models.base import Batch, Model
from craft_ray.models.features import FeatureCache
from craft_ray.retention.inputs import AnchorInputs
from craft_ray.retention.mode import RetentionMode, batches_of

TINY = 1e-12
"""Keeps the distance to an all-zero vector finite."""


def hidden_loss(student: Vectors, teacher: Vectors, loss_type: str = "relative_mse") -> Tensor:
    """Distance of the student's vectors from the teacher's, a float32 scalar.

    Raises:
        ValueError: the shapes differ, or the name of the loss is unknown.
    """
    s, t = student.values_BLVD, teacher.values_BLVD
    if s.shape != t.shape:
        raise ValueError(
            f"the student's vectors are {tuple(s.shape)} (sample, layer, vector, dim), "
            f"the cached ones {tuple(t.shape)}: the cache belongs to another model, other layers or other positions"
        )
    s, t = s.float(), t.float()
    if loss_type == "relative_mse":
        distance_BLV = (s - t).square().sum(-1) / t.square().sum(-1).clamp(min=TINY)
    elif loss_type == "mse":
        distance_BLV = (s - t).square().mean(-1)
    elif loss_type == "cosine":
        distance_BLV = 1 - cosine_similarity(s, t, dim=-1, eps=TINY)
    elif loss_type == "l1":
        distance_BLV = (s - t).abs().mean(-1)
    else:
        raise ValueError(f"unknown loss_type '{loss_type}': relative_mse, mse, cosine or l1")
    valid_BV = teacher.valid_BV
    per_vector_BV = torch.where(valid_BV, distance_BLV.mean(1), 0.0)
    return (per_vector_BV.sum(1) / valid_BV.sum(1)).mean()


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


class Hidden(RetentionMode[HiddenBatch]):
    """Keeps the student's hidden states close to the teacher's.

    Args:
        layers: resolved indices, a subset of the cache's.
        positions: a subset of the cache's.
    """

    name: ClassVar[str] = "hidden"
    needs: ClassVar[Literal["anchors", "responses", "weights"]] = "anchors"

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
    def open(
        cls,
        craft: CraftConfig,
        model: Model,
        anchors: AnchorSet,
        layers: Sequence[int],
        positions: Sequence[str],
        features: FeatureCache,
    ) -> Self:
        return cls(model, anchors, layers, positions, craft.loss_type, features)

    def batch(self, rows: Sequence[int]) -> HiddenBatch:
        """The anchors of these rows, on the host.

        Raises:
            CacheRefused: this run's preprocessing yields other vectors than the cache holds.
        """
        inputs = self._inputs.batch(rows, self.positions)
        teacher = self.teacher_vectors(rows)
        assert inputs.pooling is not None
        if not torch.equal(inputs.pooling.valid_BV, teacher.valid_BV):
            ours, theirs = inputs.pooling.valid_BV.sum(1).tolist(), teacher.valid_BV.sum(1).tolist()
            row = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), 0)
            raise CacheRefused(
                f"anchor {self.anchors.id(rows[row])} has {theirs[row]} vectors in the cache, this run's preprocessing "
                f"yields {ours[row]}: the cache was built with another preprocessor, build it again"
            )
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

    def noise_floor(self, rows: Sequence[int]) -> float:
        """Rounding with a relative mean square of r moves a vector t by a squared distance of r |t|^2. This bounds the
        others: mse by r |t|^2 / D, l1 by the root of that (mean |x| <= sqrt(mean x^2)), cosine by r / 2, plus
        float32's rounding of the difference of two numbers near 1."""
        relative = NOISE_FLOOR[self.anchors.identity.dtype]
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
        tolerance = STEP0_TOLERANCE[identity.dtype, identity.precision]
        if not loss <= tolerance:
            raise CacheRefused(
                f"the untouched student is {loss:.2e} away from the cached teacher (relative mean square), "
                f"{identity.dtype} storage explains {tolerance:.0e}: {self.anchors.remedy}"
            )
