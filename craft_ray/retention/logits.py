"""Retention mode `logits`: divergence of the student's next-token distribution from the teacher's cached one.

It is Learning without Forgetting's loss, counted from the teacher's entropy on, in nats a token; the classes and the
formula are in `craft_ray/method/divergence.py`. Every token has the same weight, so the mean over workers is the mean
over the batch's tokens.
"""

from __future__ import annotations

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
from craft_ray.method.divergence import class_log_probs, divergence, divergences, squared_surprise
from craft_ray.models.base import Batch, Model
from craft_ray.models.capabilities import logits_model
from craft_ray.models.features import FeatureCache
from craft_ray.models.tokens import at_anchored
from craft_ray.retention.inputs import AnchorInputs
from craft_ray.retention.mode import Opening, SampleMode, batches_of


@dataclass(frozen=True)
class LogitsBatch:
    """Anchors, and the teacher's distribution at N of their tokens."""

    inputs: Batch
    row_N: Tensor
    column_N: Tensor
    """Where each token is in the logits [B, P, V] of `inputs`."""
    tokens_NK: Tensor
    teacher_NC: Tensor
    """Log-probabilities, normalised."""

    @property
    def count(self) -> int:
        """Number of tokens."""
        return len(self.row_N)

    def to(self, device: torch.device) -> LogitsBatch:
        parts = (self.row_N, self.column_N, self.tokens_NK, self.teacher_NC)
        return LogitsBatch(self.inputs.to(device), *(part.to(device, non_blocking=True) for part in parts))


class Logits(SampleMode[LogitsBatch]):
    """Keeps the student's next-token distribution close to the teacher's."""

    name: ClassVar[str] = "logits"
    unit = RETENTION_MODES["logits"].unit("")

    def __init__(self, model: Model, anchors: AnchorSet, features: FeatureCache | None = None) -> None:
        held = anchors.identity.logits
        assert held is not None, "the cache has no logits"
        self.model = model
        self.anchors = anchors
        self.positions, self.temperature = held.positions, held.temperature
        self.description = f"top {held.k} next tokens at {', '.join(held.positions)}, {self.unit.words}"
        self._with_logits = logits_model(model)
        self._inputs = AnchorInputs(model, anchors, with_suffix="suffix" in held.positions, cache=features)

    @classmethod
    def open(cls, run: Opening) -> Self:
        return cls(run.model, run.anchors, run.features)

    def batch(self, rows: Sequence[int]) -> LogitsBatch:
        """The anchors of these rows, on the host.

        Raises:
            CacheRefused: this run's preprocessing yields another number of tokens than the cache holds.
        """
        inputs = self._inputs.batch(rows, self.positions)
        tokens, log_probs, valid = (
            np.concatenate(parts, 1)
            for parts in zip(*(self.anchors.likeliest(rows, p) for p in self.positions), strict=True)
        )
        self._inputs.check_counts(rows, inputs, torch.from_numpy(valid), "tokens with logits")
        # Rounded probabilities do not add up to 1; the loss of an untouched student would be the rest.
        teacher_NC = torch.from_numpy(log_probs[valid].astype(np.float32)).log_softmax(1)
        return LogitsBatch(*at_anchored(inputs), torch.from_numpy(tokens[valid].astype(np.int64)), teacher_NC)

    def loss(self, batch: LogitsBatch) -> Tensor:
        return divergence(self._student(batch), batch.teacher_NC)

    def sample_sums(self, batch: LogitsBatch) -> Tensor:
        terms_N = divergences(self._student(batch), batch.teacher_NC)
        return terms_N.new_zeros(batch.inputs.samples).index_add(0, batch.row_N, terms_N)

    def sample_counts(self, batch: LogitsBatch) -> Tensor:
        return batch.row_N.bincount(minlength=batch.inputs.samples)

    def _student(self, batch: LogitsBatch) -> Tensor:
        """The student's log-probabilities of the cached classes, [N, C]."""
        logits_NV = self._with_logits.logits(batch.inputs)[batch.row_N, batch.column_N]
        return class_log_probs(logits_NV, batch.tokens_NK, self.temperature)

    def noise_floor(self, rows: Sequence[int]) -> float:
        """Rounding with a relative mean square of r moves each log p by r (log p)^2 in the mean square, which is a
        divergence of r/2 times the mean of (log p)^2 under p. Float32's rounding of log q near 0 is added."""
        return self._of_rounding(rows, NOISE_FLOOR[self.anchors.identity.dtype])

    def _of_rounding(self, rows: Sequence[int], relative: float) -> float:
        return relative / 2 * squared_surprise(self.batch(rows).teacher_NC) + torch.finfo(torch.float32).eps ** 2

    @torch.no_grad()
    def mean_divergence(self, rows: Sequence[int], batch_size: int) -> float:
        """The loss over these rows, in nats a token."""
        total, tokens = 0.0, 0
        for part in batches_of(rows, batch_size):
            batch = self.batch(part).to(self.model.device)
            total += self.loss(batch).item() * batch.count
            tokens += batch.count
        return total / tokens

    def check_untouched(self, rows: Sequence[int], batch_size: int) -> None:
        identity = self.anchors.identity
        loss = self.mean_divergence(rows, batch_size)
        tolerance = self._of_rounding(rows, STEP0_TOLERANCE[identity.dtype, identity.precision])
        if not loss <= tolerance:
            raise CacheRefused(
                f"the untouched student is {loss:.2e} nats a token away from the cached teacher, {identity.dtype} "
                f"storage explains {tolerance:.0e}: {self.anchors.remedy}"
            )
