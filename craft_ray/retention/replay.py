"""Retention mode `replay`: cross-entropy of the anchors' own responses, in nats per token.

This is experience replay, the loss that fine-tuning itself has on labelled data of the old skill. With a multiplier
that does not move (`craft.lambda_lr: 0`) training minimises L_task + lambda L_ret.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from craft_ray.anchors.reader import AnchorSet
from craft_ray.config.modes import RETENTION_MODES
from craft_ray.models.base import Model
from craft_ray.models.features import FeatureCache
from craft_ray.retention.inputs import AnchorInputs
from craft_ray.retention.token_ce import TokenCE


class Replay(TokenCE):
    """Keeps the data's own responses likely for the student."""

    name: ClassVar[str] = "replay"
    unit = RETENTION_MODES["replay"].unit("")

    def __init__(self, model: Model, anchors: AnchorSet, features: FeatureCache | None = None) -> None:
        super().__init__(model, anchors, features)
        self._inputs = AnchorInputs(model, anchors, with_suffix=False, cache=features, with_response=True)

    def check_untouched(self, rows: Sequence[int], batch_size: int) -> None:
        """The responses are the data's, and need not be what the teacher would answer."""
