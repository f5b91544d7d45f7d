"""Small folders of the other types of LeRobot policies: ACT, pi05 and smolvla, made without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma, PiGemmaForCausalLM
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.processor import tokenizer_processor
from torch import nn
from transformers import (
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    PaliGemmaConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from craft_ray.lerobot.tokenizers import TEXT_TOKENIZER, write_text_tokenizer
from tests.support.robots import TASKS

VOCABULARY = 1024
STATE, ACTION = "observation.state", "action"
CHUNK = 8
EXECUTED = 6
"""Number of actions of a chunk that are executed."""


def write_random(folder: Path, config: PreTrainedConfig, seed: int) -> Path:
    """A policy with random weights, and processors with statistics that have an effect, as LeRobot saves them."""
    numbers = {
        "mean": torch.linspace(-0.3, 0.3, 4), "std": torch.linspace(0.5, 0.8, 4),
        "q01": torch.linspace(-1, -0.7, 4), "q99": torch.linspace(0.8, 1.1, 4),
    }  # fmt: skip
    colours = {"mean": torch.full((3, 1, 1), 0.45), "std": torch.full((3, 1, 1), 0.25)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = get_policy_class(config.type)(config)
        for parameter in policy.parameters():
            if not parameter.any():  # LeRobot starts some at zero, which would hide what passes them
                nn.init.normal_(parameter, std=0.1)
    statistics = {STATE: numbers, ACTION: numbers, **dict.fromkeys(config.image_features, colours)}
    for part in (policy, *make_pre_post_processors(config, dataset_stats=statistics)):
        part.save_pretrained(folder)
    return folder


def settings(cameras: int, side: int) -> dict[str, Any]:
    """Pictures `observation.images.camera0`, ..., a state, and actions, with 4 numbers each."""
    names = [f"observation.images.camera{number}" for number in range(cameras)]
    pictures = dict.fromkeys(names, PolicyFeature(FeatureType.VISUAL, (3, side, side)))
    return {
        "input_features": {**pictures, STATE: PolicyFeature(FeatureType.STATE, (4,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (4,))},
        "chunk_size": CHUNK,
        "n_action_steps": EXECUTED,
        "device": "cpu",
        "push_to_hub": False,
    }


# -- ACT


def small_act(folder: Path, *, cameras: int = 1, seed: int = 0, **changes: Any) -> Path:
    """An untrained ResNet and a small transformer; a picture of 64 pixels is four tokens."""
    sizes = {
        "dim_model": 32, "n_heads": 2, "dim_feedforward": 64, "n_encoder_layers": 2, "n_vae_encoder_layers": 1,
        "latent_dim": 4, "pretrained_backbone_weights": None,
    }  # fmt: skip
    return write_random(folder, ACTConfig(**{**settings(cameras, 64), **sizes, **changes}), seed)


# -- pi05


@contextmanager
def small_pi05_sizes() -> Iterator[None]:
    """While open, LeRobot builds and loads pi05 with 0.1 million parameters; its own sizes are fixed."""
    own = modeling_pi05.get_gemma_config, modeling_pi05.PaliGemmaWithExpertModel

    class Small(own[1]):  # type: ignore[misc, name-defined]
        def __init__(
            self,
            vlm: Any,
            expert: Any,
            use_adarms: Any = None,
            precision: Any = "float32",
            image_size: int = 32,
            freeze_vision_encoder: bool = False,
            train_expert_only: bool = False,
        ) -> None:
            nn.Module.__init__(self)
            self.freeze_vision_encoder, self.train_expert_only = freeze_vision_encoder, train_expert_only
            vision = SiglipVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=8,
                image_size=image_size, vision_use_head=False,
            )  # fmt: skip
            config = PaliGemmaConfig(
                text_config=_gemma(vlm), vision_config=vision, image_token_index=VOCABULARY, projection_dim=vlm.width,
                hidden_size=vlm.width,
            )  # fmt: skip
            self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(config)
            self.gemma_expert = PiGemmaForCausalLM(_gemma(expert, use_adarms=True, adarms_cond_dim=expert.width))
            self.gemma_expert.model.embed_tokens = None
            self.to_bfloat16_for_selected_params(precision)
            self._set_requires_grad()

    def size(variant: str) -> Any:
        width = 32 if variant == "gemma_2b" else 16
        return modeling_pi05.GemmaConfig(width, 2, 2 * width, num_heads=8, num_kv_heads=1, head_dim=8)

    modeling_pi05.get_gemma_config, modeling_pi05.PaliGemmaWithExpertModel = size, Small
    try:
        yield
    finally:
        modeling_pi05.get_gemma_config, modeling_pi05.PaliGemmaWithExpertModel = own


def _gemma(size: Any, **changes: Any) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.mlp_dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,  # LeRobot's joint attention is written for 8
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        hidden_activation="gelu_pytorch_tanh",
        **changes,
    )


def small_pi05(folder: Path, *, cameras: int = 1, seed: int = 0, **changes: Any) -> Path:
    """A picture is resized to 32 pixels and becomes 16 tokens. Loads within `small_pi05_sizes`."""
    tokenizer = folder / TEXT_TOKENIZER
    write_text_tokenizer(tokenizer, [f"{task} 0 1 17 255" for task in TASKS], VOCABULARY, 128)

    class Local:
        @staticmethod
        def from_pretrained(_: str, **options: Any) -> Any:
            return AutoTokenizer.from_pretrained(tokenizer, **options)

    config = PI05Config(**{**settings(cameras, 64), "image_resolution": (32, 32), **changes})
    own = tokenizer_processor.AutoTokenizer
    tokenizer_processor.AutoTokenizer = Local
    try:
        with small_pi05_sizes():
            write_random(folder, config, seed)
    finally:
        tokenizer_processor.AutoTokenizer = own
    file = folder / "policy_preprocessor.json"
    content = json.loads(file.read_text())
    for step in content["steps"]:
        if step["registry_name"] == "tokenizer_processor":
            step["config"]["tokenizer_name"] = str(tokenizer)
    file.write_text(json.dumps(content))
    return folder


# -- smolvla


def small_smolvla(folder: Path, *, cameras: int = 1, seed: int = 0, **changes: Any) -> Path:
    """Three layers of a SmolVLM, which are also trained; a picture is resized to 32 pixels and becomes 4 tokens."""
    vlm = folder.with_name(folder.name + "_vlm")
    if not vlm.exists():
        write_vlm(vlm)
    sizes = {
        "resize_imgs_with_padding": (32, 32), "num_vlm_layers": 3, "expert_width_multiplier": 0.5,
        "vlm_model_name": str(vlm), "load_vlm_weights": False, "train_expert_only": False,
        "freeze_vision_encoder": False, "num_steps": 4,
    }  # fmt: skip
    return write_random(folder, SmolVLAConfig(**{**settings(cameras, 64), **sizes, **changes}), seed)


def write_vlm(folder: Path, dtype: str = "float32") -> None:
    """The parts of a SmolVLM that LeRobot reads: its configuration and its processor."""
    write_text_tokenizer(folder, [f"{task}\n" for task in TASKS], VOCABULARY, 128)
    names = ("fake_image_token", "image_token", "global_image_token", "end_of_utterance_token", "video_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens={name: f"<reserved{number}>" for number, name in enumerate(names)},
    )
    processor = SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor(), image_seq_len=4)
    processor.save_pretrained(folder)
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=2, eos_token_id=1, dtype=dtype,
    )  # fmt: skip
    vision = SmolVLMVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        dtype=dtype,
    )  # fmt: skip
    token = tokenizer.convert_tokens_to_ids("<reserved1>")
    SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=token, pad_token_id=0
    ).save_pretrained(folder)
