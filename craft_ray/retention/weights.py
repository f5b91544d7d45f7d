"""What the retention modes `l2_sp` and `ewc` share: the student's distance from the teacher in the space of weights.

    1/2 sum_i w_i (theta_i - theta_0,i)^2

The sum is over the weights that are trained. A distance of weights is exact: it has no batches and nothing is held out,
so what is certified is this distance and not the skill. theta_0 is kept in memory in addition to the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from craft_ray.errors import CacheRefused, ConfigError
from craft_ray.models.base import Model
from craft_ray.retention.mode import RetentionMode


@dataclass(frozen=True)
class WholeModel:
    """The only batch of a distance of weights."""

    @property
    def count(self) -> int:
        return 1

    def to(self, device: torch.device) -> WholeModel:
        return self


class WeightDistance(RetentionMode[WholeModel]):
    """Keeps the trained weights close to the teacher's.

    Args:
        teacher: the model before fine-tuning. Its weights are copied.
    """

    def __init__(self, model: Model, teacher: Model) -> None:
        if model.adapter is not None:
            raise ConfigError(
                f"craft.retention_mode {self.name} measures the distance from the teacher's weights, and an adapter "
                f"leaves those as they are: leave the section adapter out, or choose another mode"
            )
        if model.sharded:
            raise ConfigError(
                f"craft.retention_mode {self.name} sums over all weights, and workers.sharding leaves each worker a "
                f"part of them: set workers.sharding=none, or choose another mode"
            )
        self.model = model
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        theirs = dict(teacher.module.named_parameters())
        self.parameters = list(trained.values())
        self.origin = [theirs[name].detach().clone() for name in trained]

    @property
    def megabytes(self) -> float:
        """Memory of the copy of the teacher's weights, in 10^6 bytes."""
        return sum(tensor.nbytes for tensor in self.origin) / 1e6

    def split(self, holdout: float, skill: str | None = None) -> tuple[list[int], list[int]]:
        """One row, the weights; none is held out."""
        return [0], []

    def batch(self, rows: Sequence[int]) -> WholeModel:
        return WholeModel()

    def noise_floor(self, rows: Sequence[int]) -> float:
        """The teacher's weights are kept exactly."""
        return 0.0

    def distance(self, weights: Sequence[Tensor | float]) -> Tensor:
        """1/2 sum_i w_i (theta_i - theta_0,i)^2 in float32."""
        terms = [
            (weight * (ours.float() - theirs.float()).square()).sum()
            for ours, theirs, weight in zip(self.parameters, self.origin, weights, strict=True)
        ]
        return torch.stack(terms).sum() / 2

    @torch.no_grad()
    def check_untouched(self, rows: Sequence[int], batch_size: int) -> None:
        distance = float(self.loss(WholeModel()))
        if distance != 0:
            raise CacheRefused(f"the untouched student is {distance:.2e} away from the teacher in its weights")
