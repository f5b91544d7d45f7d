"""The loss of suffix tokens on logits that are written down by hand."""

from __future__ import annotations

import math

import pytest
import torch

from craft_ray.models.tokens import token_loss


def test_token_loss_is_the_mean_over_real_targets_in_nats() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05]]))
    targets = torch.tensor([0, 1, -100])
    expected = -(math.log(0.5) + math.log(0.2)) / 2
    assert token_loss(logits, targets, 2).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_loss_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, targets = (10 * torch.randn(7, 11)).to(dtype), torch.randint(0, 11, (7,))
    loss = token_loss(logits, targets, 7)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, token_loss(logits.float(), targets, 7))


def test_token_loss_ignores_padded_targets() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 5), torch.tensor([1, -100, 3, -100])
    dirty = logits.masked_fill((targets == -100)[:, None], 1e4)
    assert torch.equal(token_loss(logits, targets, 2), token_loss(dirty, targets, 2))
