"""The costs of a stage as formulas: bytes and floating-point operations. Needs no library; `scaling.py` prints them.

P parameters, D width, L cached layers, V vectors per anchor, n tokens per sample, A anchors, W workers. A
multiplication and an addition count as two operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK = 1024
"""A flat gradient is padded to a multiple of this many elements (craft_ray/method/gradients.py)."""

FLOAT16, INT32 = 2, 4


@dataclass(frozen=True)
class Vision:
    """A SigLIP tower and the projection of its patches to the language model's width."""

    width: int
    layers: int
    inner: int
    patches: int
    patch: int = 14

    def parameters(self, language_width: int) -> int:
        w, i = self.width, self.inner
        block = 4 * (w * w + w) + (w * i + i) + (i * w + w) + 4 * w
        embedding = self.patch**2 * 3 * w + w + self.patches * w
        return self.layers * block + embedding + 2 * w + w * language_width + language_width

    def forward_flops(self, language_width: int) -> int:
        """Operations for one image."""
        w, n = self.width, self.patches
        block = 2 * n * (4 * w * w + 2 * w * self.inner) + 4 * n * n * w
        return self.layers * block + 2 * n * w * (self.patch**2 * 3 + language_width)


@dataclass(frozen=True)
class Model:
    """A decoder with grouped attention and a gated MLP, as in Llama, Mistral and Gemma."""

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    tied: bool
    vision: Vision | None = None

    @property
    def block_matrices(self) -> int:
        """Parameters of the matrices of one block."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.inner

    @property
    def parameters(self) -> int:
        blocks = self.layers * (self.block_matrices + 2 * self.width) + self.width
        vision = self.vision.parameters(self.width) if self.vision else 0
        return blocks + vision + (1 if self.tied else 2) * self.vocabulary * self.width

    def forward_flops(self, tokens: int, logits: int = 0) -> int:
        """Operations for one sample of `tokens` tokens, image tokens included; the vocabulary projection at `logits` of
        them. Attention is counted in full; kernels that skip what the causal mask hides do about half of that part."""
        attention = 4 * tokens * tokens * self.heads * self.head_size
        decoder = self.layers * (2 * tokens * self.block_matrices + attention)
        vision = self.vision.forward_flops(self.width) if self.vision else 0
        return decoder + vision + 2 * logits * self.vocabulary * self.width


@dataclass(frozen=True)
class Anchor:
    """The stored parts of an anchor, and the inputs of its forward pass."""

    tokens: int
    """Tokens of the prompt, image tokens included."""
    vectors: int
    layers: int
    suffix: int
    """Suffix tokens, 0 if none is generated."""
    input_bytes: int
    """Bytes of the prompt and the encoded image."""
    id_bytes: int = 8

    def stored_bytes(self, model: Model) -> int:
        return self.hidden_bytes(model) + self.input_bytes + self.id_bytes + INT32 * self.suffix

    def hidden_bytes(self, model: Model) -> int:
        return self.vectors * self.layers * model.width * FLOAT16

    def build_flops(self, model: Model) -> int:
        """Hidden states of prompt and suffix, after the suffix was generated token by token with a cache of keys and
        values: the prompt once, and for each further token the blocks once."""
        hidden = model.forward_flops(self.tokens + self.suffix)
        if not self.suffix:
            return hidden
        attended = sum(range(self.tokens + 1, self.tokens + self.suffix))
        later = (self.suffix - 1) * model.layers * 2 * model.block_matrices
        later += model.layers * 4 * attended * model.heads * model.head_size
        return hidden + model.forward_flops(self.tokens) + later + 2 * self.suffix * model.vocabulary * model.width


def padded(parameters: int) -> int:
    return math.ceil(parameters / BLOCK) * BLOCK


def step_flops(model: Model, task_tokens: int, task_logits: int, task: int, anchor_tokens: int, anchors: int) -> int:
    """Operations of a worker's step in mode `hidden`: a backward pass costs twice the forward pass."""
    forward = task * model.forward_flops(task_tokens, task_logits) + anchors * model.forward_flops(anchor_tokens)
    return 3 * forward


def state_bytes(parameters: int, number: int = 4, constrained: bool = True) -> int:
    """Bytes in each worker without activations: weights, the gradients of the task and of the retention loss, AdamW's
    two moments."""
    return number * (3 * parameters + (2 if constrained else 1) * padded(parameters))


def summed_bytes(parameters: int, number: int = 4, constrained: bool = True) -> int:
    """Bytes that a step passes to all-reduce: the gradients, in buckets, and two numbers of each loss."""
    rows = 2 if constrained else 1
    return rows * (number * parameters + 16)


def sent_bytes(parameters: int, workers: int, number: int = 4, constrained: bool = True) -> float:
    """Bytes that each worker sends per step if all-reduce is a ring: 2 (W - 1) / W of what is summed."""
    return 2 * (workers - 1) / workers * summed_bytes(parameters, number, constrained)


def checkpoint_bytes(parameters: int, number: int = 4) -> int:
    """Bytes of the weights and AdamW's two moments."""
    return 3 * number * parameters


def step_seconds(
    model: Model, flops: float, workers: int, flops_per_second: float, bytes_per_second: float, number: int = 4
) -> tuple[float, float]:
    """Computation and communication of a step, in sequence: all-reduce starts when a gradient is complete."""
    return flops / flops_per_second, sent_bytes(model.parameters, workers, number) / bytes_per_second


def trials_at_once(gpus: int, workers: int) -> int:
    return gpus // workers


SMOLLM2 = Model(
    "SmolLM2-135M", width=576, layers=30, heads=9, kv_heads=3, head_size=64, inner=1536, vocabulary=49152, tied=True
)
PALIGEMMA = Model(
    "PaliGemma-3B (224 px)", width=2048, layers=18, heads=8, kv_heads=1, head_size=256, inner=16384,
    vocabulary=257216, tied=True, vision=Vision(width=1152, layers=27, inner=4304, patches=256),
)  # fmt: skip
MISTRAL = Model(
    "Mistral-7B-v0.1", width=4096, layers=32, heads=32, kv_heads=8, head_size=128, inner=14336, vocabulary=32000,
    tied=False,
)  # fmt: skip
MODELS = (SMOLLM2, PALIGEMMA, MISTRAL)
