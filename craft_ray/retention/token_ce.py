"""Retention mode `token_ce`: cross-entropy of the teacher's own greedy suffix tokens, in nats per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from craft_ray.anchors.reader import AnchorSet
from craft_ray.anchors.schema import STEP0_AGREEMENT
from craft_ray.config.modes import RETENTION_MODES
from craft_ray.errors import CacheRefused
from craft_ray.models.base import IGNORE, Batch, Model
from craft_ray.models.capabilities import TokenModel, token_model
from craft_ray.models.features import FeatureCache
from craft_ray.retention.inputs import AnchorInputs
from craft_ray.retention.mode import Opening, SampleMode, batches_of


@dataclass(frozen=True)
class TokenBatch:
    """Prompts followed by the teacher's suffix tokens."""

    inputs: Batch

    @property
    def count(self) -> int:
        """Number of suffix tokens."""
        return self.inputs.tokens

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(self.inputs.to(device))


class TokenCE(SampleMode[TokenBatch]):
    """Keeps the tokens that the teacher generated likely for the student."""

    name: ClassVar[str] = "token_ce"
    unit = RETENTION_MODES["token_ce"].unit("")
    description = unit.words
    model: TokenModel

    def __init__(self, model: Model, anchors: AnchorSet, features: FeatureCache | None = None) -> None:
        self.model = token_model(model)
        self.anchors = anchors
        self._inputs = AnchorInputs(model, anchors, with_suffix=True, cache=features)

    @classmethod
    def open(cls, run: Opening) -> Self:
        return cls(run.model, run.anchors, run.features)

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        return TokenBatch(self._inputs.batch(rows))

    def loss(self, batch: TokenBatch) -> Tensor:
        return self.model.token_loss(batch.inputs)

    def sample_sums(self, batch: TokenBatch) -> Tensor:
        return -self.model.token_log_probs(batch.inputs)[0].sum(1)

    def sample_counts(self, batch: TokenBatch) -> Tensor:
        return (batch.inputs.targets_BP != IGNORE).sum(1)

    def noise_floor(self, rows: Sequence[int]) -> float:
        """Tokens are stored exactly."""
        return 0.0

    @torch.no_grad()
    def check_untouched(self, rows: Sequence[int], batch_size: int) -> None:
        identity = self.anchors.identity
        if identity.suffix_from != "teacher":
            return  # the data's own responses need not be likely
        tokens, wrong = 0, 0
        for part in batches_of(rows, batch_size):
            batch = self.batch(part).to(self.model.device)
            tokens += batch.count
            wrong += int((~self.model.token_log_probs(batch.inputs)[1]).sum())
        agreement = 1 - wrong / tokens
        if agreement < STEP0_AGREEMENT[identity.precision]:
            raise CacheRefused(
                f"the untouched student agrees with only {agreement:.1%} of the teacher's cached tokens: "
                f"{self.anchors.remedy}"
            )
