"""Models of the simulation by their shapes: Llama's 7 B and 70 B, and the PaliGemma inside LeRobot's pi0_fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

CAMERAS, PATCHES, ACTIONS = 3, 256, 256
"""Images of pi0_fast, their tokens, and the action tokens at the end of its sequence."""


def llama(width: int, layers: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
        )
    )  # fmt: skip


class Pi0FastBase(nn.Module):
    """Image tokens before text tokens, through Gemma."""

    def __init__(self, text: GemmaConfig, vision: SiglipVisionConfig) -> None:
        super().__init__()
        self.vision_tower = SiglipVisionModel(vision)
        self.projector = nn.Linear(vision.hidden_size, text.hidden_size)
        self.language_model = GemmaModel(text)

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        """`input_ids` [B, T], of which the first tokens stand for the images."""
        size = self.vision_tower.config.image_size
        images = torch.zeros(len(input_ids) * CAMERAS, 3, size, size)
        patches_BTD = self.projector(self.vision_tower(images).last_hidden_state).flatten(0, 1)[None]
        patches_BTD = patches_BTD.view(len(input_ids), -1, patches_BTD.shape[-1])
        words_BTD = self.language_model.embed_tokens(input_ids[:, patches_BTD.shape[1] :])
        embedded_BTD = torch.cat([patches_BTD.to(words_BTD.dtype), words_BTD], 1)
        return self.language_model(inputs_embeds=embedded_BTD, **options)


class Pi0Fast(nn.Module):
    """PaliGemma as LeRobot's pi0_fast has it: its head and its embeddings are not tied."""

    base_model_prefix = "base_model"

    def __init__(self, text: GemmaConfig, vision: SiglipVisionConfig) -> None:
        super().__init__()
        self.config = text
        self.base_model = Pi0FastBase(text, vision)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.base_model(**inputs).last_hidden_state))

    def gradient_checkpointing_enable(self, how: dict[str, Any]) -> None:
        for part in (self.base_model.vision_tower, self.base_model.language_model):
            part.gradient_checkpointing_enable(how)


def pi0_fast(text_layers: int, vision_layers: int) -> nn.Module:
    text = GemmaConfig(
        vocab_size=257152, hidden_size=2048, intermediate_size=16384, num_hidden_layers=text_layers,
        num_attention_heads=8, num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=vision_layers,
        num_attention_heads=16, patch_size=14, image_size=224, vision_use_head=False,
    )  # fmt: skip
    return Pi0Fast(text, vision)


@dataclass(frozen=True)
class Simulated:
    """A model, and the length of its samples."""

    make: Callable[..., nn.Module]
    """From numbers of layers."""
    layers: tuple[int, ...]
    tokens: int
    suffix: int = 0
    """Tokens at the end of a sample at which hidden states are compared; 0: at all tokens."""


MODELS = {
    "tiny": Simulated(lambda layers: llama(64, layers, 256, 4, 2, 512), (6,), 32),
    "small": Simulated(lambda layers: llama(512, layers, 1536, 8, 4, 8192), (8,), 256),
    "pi0_fast": Simulated(pi0_fast, (18, 27), CAMERAS * PATCHES + 200 + ACTIONS, ACTIONS),
    "7B": Simulated(lambda layers: llama(4096, layers, 11008, 32, 32, 32000), (32,), 2048),
    "70B": Simulated(lambda layers: llama(8192, layers, 28672, 64, 8, 32000), (80,), 2048),
}
