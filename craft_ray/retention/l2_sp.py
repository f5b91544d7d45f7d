"""Retention mode `l2_sp`: 1/2 sum_i (theta_i - theta_0,i)^2 (Li, Grandvalet and Davoine, arXiv 1802.01483).

It needs no anchors at all.
"""

from __future__ import annotations

from typing import ClassVar, Self

from torch import Tensor

from craft_ray.config.modes import RETENTION_MODES
from craft_ray.models.base import Model
from craft_ray.retention.mode import Opening
from craft_ray.retention.weights import WeightDistance, WholeModel


class L2SP(WeightDistance):
    """Keeps all trained weights equally close."""

    name: ClassVar[str] = "l2_sp"
    unit = RETENTION_MODES["l2_sp"].unit("")
    cache = None

    def __init__(self, model: Model, teacher: Model) -> None:
        super().__init__(model, teacher)
        self.fingerprint = teacher.weights_fingerprint()
        self.description = f"{self.unit.words}, {self.megabytes:.1f} MB more memory"

    @classmethod
    def open(cls, run: Opening) -> Self:
        return cls(run.model, run.teacher())

    def loss(self, batch: WholeModel) -> Tensor:
        return self.distance([1.0] * len(self.parameters))
