"""Tiny models of the families that read several images, or cut an image into tiles, with random weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMProcessor,
    processing_utils,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_processing_utils import VideoProcessorMixin

from craft_ray.examples.text import byte_tokenizer
from tests.support.weights import spread

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
EYE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and LEARNT %}"
    "{% generation %}{{ m['content'][0]['text'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The same text, with the marks of what is learnt."""


class NoVideos(VideoProcessorMixin):
    """Stands for the part of a processor that reads videos and needs torchvision, which the tests have no build of."""

    merge_size = 2
    num_frames = fps = 1

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Self:
        return cls()


@contextmanager
def without_videos() -> Iterator[None]:
    """Processors are built and load without torchvision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_utils.transformers_module, "VideoProcessorMixin", VideoProcessorMixin, raising=False)
        patch.setattr(import_module("transformers.models.auto.video_processing_auto"), "AutoVideoProcessor", NoVideos)
        yield


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _tokenizer(*more: str, **named: str) -> PreTrainedTokenizerFast:
    """A token for each byte, ChatML's marks, and the family's own."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer().backend_tokenizer,
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=named,
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *more]})
    return tokenizer


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


TILES = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 8}}
"""Up to four tiles of 8x8 and the whole picture."""


def _splitting(config_class: Any, processor_class: Any, pictures: Any, **videos: Any) -> tuple[Any, Any]:
    """Idefics3 and SmolVLM: [samples, tiles, ...] with a mask, 4 image tokens a tile."""
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 3) for c in range(1, 3)]
    tokenizer = _tokenizer(
        "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "<video>", *rows
    )
    processor = processor_class(pictures(**TILES), tokenizer, image_seq_len=4, **videos)
    config = config_class(
        text_config=LlamaConfig(**SMALL, **_ids(tokenizer)),
        vision_config=EYE | {"image_size": 8, "patch_size": 2},
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    return config, processor


def idefics3() -> tuple[Any, Any]:
    return _splitting(Idefics3Config, Idefics3Processor, Idefics3ImageProcessorPil)


def smolvlm() -> tuple[Any, Any]:
    return _splitting(SmolVLMConfig, SmolVLMProcessor, SmolVLMImageProcessorPil, video_processor=NoVideos())


def llava_next(tokenizer: PreTrainedTokenizerFast | None = None) -> tuple[Any, Any]:
    """[images, tiles, ...], as many tiles as the image with the most; `image_sizes` tell which are real.

    Args:
        tokenizer: one that merges bytes.
    """
    if tokenizer is None:
        tokenizer = _tokenizer("<image>")
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    grid = [[8, 16], [16, 8], [16, 16]]
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_grid_pinpoints=grid
    )
    processor = LlavaNextProcessor(
        pictures, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**EYE, image_size=8, patch_size=4, projection_dim=16),
        text_config=LlamaConfig(**SMALL, **_ids(tokenizer)),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        image_grid_pinpoints=grid,
    )
    return config, processor


def _qwen(config_class: Any, processor_class: Any, eye: dict[str, Any]) -> tuple[Any, Any]:
    """All patches of all images in one list, and the grid of each image."""
    tokenizer = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    pictures = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=512)
    processor = processor_class(pictures, tokenizer, NoVideos())
    config = config_class(
        text_config=SMALL | _ids(tokenizer) | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config=eye | {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return config, processor


def qwen2_vl() -> tuple[Any, Any]:
    return _qwen(Qwen2VLConfig, Qwen2VLProcessor, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2})


def qwen2_5_vl() -> tuple[Any, Any]:
    eye = {
        "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLProcessor, eye)


def gemma3() -> tuple[Any, Any]:
    """All images in one list, with pan and scan the crops of each behind it; tokens of an image see each other."""
    tokenizer = _tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    pictures = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    processor = Gemma3Processor(image_processor=pictures, tokenizer=tokenizer, image_seq_length=4)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=64, **_ids(tokenizer)),
        vision_config=SiglipVisionConfig(**EYE, image_size=8, patch_size=2, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return config, processor


def internvl() -> tuple[Any, Any]:
    """All tiles of all images in one list; nothing else says which tile belongs to which image."""
    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    pictures = GotOcr2ImageProcessorPil(
        size={"height": 8, "width": 8}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = InternVLProcessor(pictures, tokenizer, NoVideos(), image_seq_length=4)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**EYE, image_size=[8, 8], patch_size=[2, 2]),
        text_config=Qwen2Config(**SMALL, **_ids(tokenizer)),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return config, processor


BUILDERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "idefics3": idefics3, "smolvlm": smolvlm, "llava_next": llava_next, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl,
    "gemma3": gemma3, "internvl": internvl,
}  # fmt: skip
AROUND = {"qwen2_vl": "<|vision_start|>{}<|vision_end|>", "qwen2_5_vl": "<|vision_start|>{}<|vision_end|>"}
"""What the template of a family writes for an image, around its mark."""


def build(family: str, folder: Path, *made: PreTrainedTokenizerFast) -> Path:
    """Write the folder of a family's tiny model; LLaVA's may have another tokenizer."""
    config, processor = BUILDERS[family](*made)
    mark = AROUND.get(family, "{}").format(processor.image_token)
    processor.chat_template = TEMPLATE.replace("MARK", mark)
    torch.manual_seed(0)
    module = AutoModelForImageTextToText.from_config(config)
    spread(module)
    module.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
