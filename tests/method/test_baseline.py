"""CRaFT switched off is plain fine-tuning, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from craft_ray.method.gradients import GradientPair
from craft_ray.method.step import task_step
from tests.support.worlds import ONE, batch, mlp, squared_error

STEPS = 6


class WithIdleParts(nn.Module):
    """A network beside a layer that nothing uses and a parameter that is frozen."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.body(*args, **inputs)


@dataclass(frozen=True)
class Tokens:
    """Sequences of tokens."""

    ids: torch.Tensor

    @property
    def count(self) -> int:
        return self.ids.numel()


def compare_with_plain_loop(
    module: nn.Module, loss_of: Callable[[nn.Module], Callable[[Any], torch.Tensor]], batches: list[Any],
    max_norm: float | None,
) -> None:  # fmt: skip
    """Train two copies, one with task_step and one with the loop of every tutorial."""
    ours, plain = module, deepcopy(module)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
    trainable = [p for p in plain.parameters() if p.requires_grad]
    plain_optimizer = torch.optim.AdamW(trainable, **settings)
    pair = GradientPair(ours.named_parameters(), with_retention=False)
    optimizer = torch.optim.AdamW(pair.parameters, **settings)
    for data in batches:
        loss, norm = task_step(
            loss_of(ours), [data], optimizer=optimizer, gradients=pair, workers=ONE, max_norm=max_norm
        )
        plain_optimizer.zero_grad()
        plain_loss = loss_of(plain)(data)
        plain_loss.backward()
        plain_norm = torch.nn.utils.clip_grad_norm_(trainable, torch.inf if max_norm is None else max_norm)
        plain_optimizer.step()
        assert torch.equal(loss, plain_loss)
        assert torch.equal(norm, plain_norm)
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)
    assert len(optimizer.state) == len(plain_optimizer.state)


@pytest.mark.parametrize("max_norm", [0.05, 1e6, None])
def test_a_small_network(max_norm: float | None) -> None:
    batches = [batch(seed) for seed in range(STEPS)]
    compare_with_plain_loop(WithIdleParts(mlp()), squared_error, batches, max_norm)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_norm", [0.05, None])
def test_a_llama(tied: bool, max_norm: float | None) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip

    def loss_of(model: nn.Module) -> Callable[[Tokens], torch.Tensor]:
        return lambda data: model(input_ids=data.ids, labels=data.ids, use_cache=False).loss

    batches = [Tokens(torch.randint(0, 61, (2, 16))) for _ in range(STEPS)]
    compare_with_plain_loop(WithIdleParts(LlamaForCausalLM(config)), loss_of, batches, max_norm)
