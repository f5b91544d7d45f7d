"""Gemma-shaped models with random weights, texts of mixed lengths, and the two losses of a retention step.

Needs only torch and transformers, so that `gpu.py` can use it on a bare machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import GemmaConfig, GemmaForCausalLM

from craft_ray.method.distance import hidden_loss
from craft_ray.method.pooling import Layout, Pooling, Vectors
from craft_ray.models.sharding import base_forward
from craft_ray.models.tokens import token_loss


@dataclass(frozen=True)
class Shape:
    """The numbers that determine the cost of a Gemma."""

    width: int
    layers: int
    inner: int
    heads: int
    vocabulary: int
    head_size: int = 64
    kv_heads: int = 1

    def config(self) -> GemmaConfig:
        return GemmaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


SHAPES = {
    "tiny": Shape(width=32, layers=2, inner=64, heads=2, vocabulary=256, head_size=16),
    "10m": Shape(width=256, layers=8, inner=1024, heads=4, vocabulary=8192),
    "100m": Shape(width=768, layers=10, inner=3072, heads=12, vocabulary=16384),
    "smollm2": Shape(width=576, layers=30, inner=1536, heads=9, vocabulary=49152, kv_heads=3),
    "400m": Shape(width=1024, layers=18, inner=4096, heads=8, vocabulary=65536, head_size=128),
    "1b": Shape(width=1536, layers=20, inner=6144, heads=8, vocabulary=131072, head_size=192),
    "2.5b": Shape(width=2048, layers=18, inner=16384, heads=8, vocabulary=257216, head_size=256),
}
"""`smollm2` has the size of SmolLM2-135M; `2.5b` has the size of Gemma 2B, the language model of PaliGemma."""


def language_model(
    shape: Shape, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> GemmaForCausalLM:
    """A model with random weights, created on its device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GemmaForCausalLM(shape.config())
    finally:
        torch.set_default_dtype(before)


def mixed_lengths(count: int, low: int, high: int, seed: int = 0) -> list[int]:
    """Lengths of texts, log-uniform: many short ones, few long ones."""
    places = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (low * torch.exp(places * math.log(high / low))).long().clamp(low, high).tolist()


def random_texts(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[Tensor]:
    """Token ids of texts, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


@dataclass(frozen=True)
class TextBatch:
    """Texts of one length, for both losses."""

    ids_BS: Tensor
    mask_BS: Tensor
    count: int
    """Terms of the mean loss."""
    pooling: Pooling | None = None
    teacher: Vectors | None = None


@dataclass(frozen=True)
class RetentionTask:
    """A model with one batch of each kind, and the losses as the product computes them."""

    model: GemmaForCausalLM
    task: TextBatch
    anchors: TextBatch
    layers: tuple[int, ...]

    @classmethod
    def of(cls, model: GemmaForCausalLM, batch: int, length: int, seed: int = 0) -> RetentionTask:
        """Random texts, and a teacher that differs slightly from the student, so that both gradients are nonzero."""
        device, config = model.device, model.config
        generator = torch.Generator().manual_seed(seed)

        def texts() -> Tensor:
            return torch.randint(3, config.vocab_size, (batch, length), generator=generator).to(device)

        layers = (config.num_hidden_layers - 1, config.num_hidden_layers)
        layouts = [Layout(length, length)] * batch
        pooling = Pooling.plan(layouts, ("all",), length).to(device)
        mask = torch.ones(batch, length, dtype=torch.long, device=device)
        values = torch.randn(batch, len(layers), length, config.hidden_size, generator=generator)
        teacher = Vectors(values.to(device, torch.float16), pooling.valid_BV)
        return cls(
            model,
            TextBatch(texts(), mask, batch * (length - 1)),
            TextBatch(texts(), mask, batch, pooling, teacher),
            layers,
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def task_loss(self, batch: TextBatch) -> Tensor:
        logits_BSV = self.model(input_ids=batch.ids_BS, attention_mask=batch.mask_BS, use_cache=False).logits
        return token_loss(logits_BSV[:, :-1].flatten(0, 1), batch.ids_BS[:, 1:].flatten(), batch.count)

    def retention_loss(self, batch: TextBatch) -> Tensor:
        assert batch.pooling is not None
        assert batch.teacher is not None
        states = base_forward(self.model)(
            input_ids=batch.ids_BS, attention_mask=batch.mask_BS, use_cache=False, output_hidden_states=True
        ).hidden_states
        return hidden_loss(batch.pooling([states[k] for k in self.layers]), batch.teacher)


class Perceptron(torch.nn.Module):
    """A model in which nothing waits for the device."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


@dataclass(frozen=True)
class Points:
    """A batch of the perceptron."""

    inputs: Tensor
    wanted: Tensor
    count: int


def perceptron_task(device: torch.device | str) -> tuple[Perceptron, Callable[[Any], Tensor], Points, Points]:
    """The perceptron, its loss, and a batch each for the task and for retention."""
    torch.manual_seed(0)
    model = Perceptron().to(device)

    def points() -> Points:
        return Points(torch.randn(8, 16, device=device), torch.randn(8, 16, device=device), 8)

    return model, lambda batch: mse_loss(model(batch.inputs), batch.wanted), points(), points()
