"""The three numbers that describe the angle between the two gradients, in one pass over both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024
"""Elements per partial sum. Partial sums are added in float64: with a plain float32 dot product of 5e7 elements the
cosine was off by 2e-3."""

SLAB = 1 << 26
"""Elements that are widened to float32 at a time if gradients are stored in a shorter type."""


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of g_t and g_r before surgery: three scalars (float64, on the device)."""

    dot: Tensor
    task_sq: Tensor
    retention_sq: Tensor

    @property
    def cos(self) -> Tensor:
        """<g_t, g_r> / (|g_t| |g_r|); NaN where a gradient is zero, which is never below a threshold."""
        return self.dot / (self.task_sq * self.retention_sq).sqrt()


def gram_sums(pairs: Sequence[Tensor | tuple[Tensor, Tensor]]) -> Tensor:
    """The sums of products [2, 2], in float64, over pairs of flat gradients: a tensor [2, P], or two of [P], each
    with its own type. P is divisible by BLOCK."""
    device = pairs[0][0].device
    gram = torch.zeros(2, 2, dtype=torch.float64, device=device)
    with _no_autocast(device):
        for pair in pairs:
            plain = isinstance(pair, Tensor) and pair.dtype == torch.float32
            for slab_2P in (pair,) if plain else _widened(*pair):
                blocks_NB2 = slab_2P.view(2, -1, BLOCK).permute(1, 2, 0)  # type: ignore[union-attr]
                gram += torch.bmm(blocks_NB2.transpose(1, 2), blocks_NB2).sum(0, dtype=torch.float64)
    return gram


def _widened(task_P: Tensor, retention_P: Tensor) -> Iterator[Tensor]:
    for slabs in zip(task_P.split(SLAB), retention_P.split(SLAB), strict=True):
        yield torch.stack([slab.float() for slab in slabs])


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A caller's autocast would multiply in bf16."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
