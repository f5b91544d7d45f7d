"""Suffix tokens: which of a batch are predicted, how likely they are, and where a suffix ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from craft_ray.method.pooling import Layout
from craft_ray.models.base import IGNORE, Batch


def listed(value: int | list[int] | None) -> list[int]:
    """Token ids as transformers holds them: none, one, or several."""
    return [] if value is None else value if isinstance(value, list) else [value]


def clip_suffix(tokens: Sequence[int], stops: Collection[int]) -> list[int]:
    """Tokens up to and including the first that is one of `stops`."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])


def targets(layouts: Sequence[Layout], input_ids_BS: Tensor) -> tuple[Tensor, Tensor, int]:
    """(keep_P, targets_BP, count) for next-token prediction of every sample's suffix, or of its learnt tokens."""
    spans = [layout.predicted for layout in layouts]
    keep = sorted({t - 1 for span in spans for t in span})
    column_of = {position: column for column, position in enumerate(keep)}
    result = torch.full((len(layouts), len(keep)), IGNORE)
    for row, span in enumerate(spans):
        if span:
            columns = torch.tensor([column_of[t - 1] for t in span])
            result[row, columns] = input_ids_BS[row, torch.tensor(span)]
    return torch.tensor(keep, dtype=torch.long), result, sum(map(len, spans))


def at_anchored(batch: Batch) -> tuple[Batch, Tensor, Tensor]:
    """The batch, changed so that a model's `logits` are those at its anchored tokens, and the row and column in them
    of each of these N tokens, sample after sample. On the host."""
    assert batch.pooling is not None
    index_BV, valid_BV = batch.pooling.index_BV, batch.pooling.valid_BV
    keep_P, column_N = index_BV[valid_BV].unique(return_inverse=True)
    return replace(batch, keep_P=keep_P), valid_BV.nonzero()[:, 0], column_N


def token_loss(logits_NV: Tensor, targets_N: Tensor, count: int) -> Tensor:
    """Mean cross-entropy of N target tokens of which `count` are real and the others are -100, in nats, float32."""
    return cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE, reduction="sum") / count


def token_log_probs(logits_BPV: Tensor, targets_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token in float32 and whether it is the most likely one, each [B, P]; 0 and True
    where there is no target."""
    logits_BPV = logits_BPV.float()
    log_probs_BP = -cross_entropy(
        logits_BPV.flatten(0, 1), targets_BP.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(targets_BP)
    return log_probs_BP, (logits_BPV.argmax(-1) == targets_BP) | (targets_BP == IGNORE)
