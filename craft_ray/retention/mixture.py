"""A batch of anchors of several skills. One forward pass gives the loss of each skill, and one backward pass the
gradient of their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from craft_ray.retention.mode import SampleMode, Terms


@dataclass(frozen=True)
class MixedBatch:
    """Anchors of S skills."""

    anchors: Terms
    skill_B: Tensor
    """The index of each anchor's skill."""
    counts_S: Tensor
    """The number of each skill's terms."""

    @property
    def count(self) -> int:
        return self.anchors.count

    def to(self, device: torch.device) -> MixedBatch:
        return MixedBatch(self.anchors.to(device), self.skill_B.to(device), self.counts_S.to(device))


@dataclass(frozen=True)
class Mixture:
    """How anchors of several skills are batched, under one retention mode."""

    mode: SampleMode[Any]
    skills: int

    def batch(self, rows: Sequence[int], skill_of: Sequence[int]) -> MixedBatch:
        """The anchors of these rows, each with the index of its skill, on the host."""
        anchors = self.mode.batch(rows)
        skill_B = torch.tensor(skill_of)
        return MixedBatch(anchors, skill_B, self._by_skill(self.mode.sample_counts(anchors).double(), skill_B))

    def sums(self, batch: MixedBatch) -> Tensor:
        """The sum of each skill's terms, [S]."""
        return self._by_skill(self.mode.sample_sums(batch.anchors), batch.skill_B)

    def _by_skill(self, values_B: Tensor, skill_B: Tensor) -> Tensor:
        return values_B.new_zeros(self.skills).index_add(0, skill_B, values_B)
