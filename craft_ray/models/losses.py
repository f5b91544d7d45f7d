"""The loss of tokens, for the task and for retention alike."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy


def token_loss(logits_NV: Tensor, targets_N: Tensor, count: int) -> Tensor:
    """Mean cross-entropy of N target tokens of which `count` are real and the others are -100, in nats, float32."""
    return cross_entropy(logits_NV.float(), targets_N, ignore_index=-100, reduction="sum") / count
