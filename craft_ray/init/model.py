"""What a first config needs to know of a model, without loading its weights."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from craft_ray.config import ModelConfig
from craft_ray.data.images import decode_image
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError
from craft_ray.models.chat import ChatTemplate
from craft_ray.models.loading import load_processor, reason
from craft_ray.models.text import TextEncoder
from craft_ray.storage.last import through_last
from craft_ray.storage.node_cache import local_copy
from craft_ray.storage.paths import ObjectPath, StoragePath, storage_path

WEIGHTS = "*.safetensors"
IMAGES_TRIED = 4
"""Images whose tokens are counted: a processor that tiles gives more to a large one."""


@dataclass(frozen=True)
class ModelFacts:
    """A model as its folder or its page on the hub describes it."""

    path: str
    kind: Literal["vision_language", "causal_lm", "lerobot"]
    parameters: int = 0
    """Number of them; for a policy of LeRobot those in its files, 0 if they are on the hub."""
    processor: Any = field(default=None, repr=False)
    has_template: bool = False
    longest: int | None = None
    """Positions that the model was trained on."""
    token_bytes: int = 0
    """Memory that a token of a training step takes in float32: activations of all blocks, and its logits."""

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def _text(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.processor, self.tokenizer, self.kind == "vision_language", self.path)

    def tokens_of(self, sample: Sample, chat: bool, images: int) -> tuple[int, int]:
        """The tokens of a sample without its response, and of the response.

        Args:
            chat: whether the chat template writes it.
            images: tokens that an image takes.
        """
        pictures = images * len(sample.pictures or ())
        response = len(self._text.following("", sample.response)) if sample.response else 0
        if not chat:
            return len(self._text.plain(sample.prompt)) + pictures, response + 1
        # The template may write more after the answer than one token, and every turn is learnt.
        if sample.response is None:
            return len(self._text.written(self._chat.prompt(sample))) + pictures, 0
        whole = len(self._text.written(self._chat.learnt(sample).text))
        return max(whole - response, 0) + pictures, response + 1

    def image_tokens(self, samples: list[Sample]) -> int:
        """Tokens that an image of these samples takes, at most."""
        found = [data for sample in samples for data in sample.pictures or ()]
        mark, sizes = self.processor.image_token, [0]
        for data in found[:IMAGES_TRIED]:
            image = decode_image(data, "an image")
            sizes.append(self.processor(images=[[image]], text=[mark], return_tensors="pt")["input_ids"].shape[1])
        return max(sizes)


def look_at_model(path: str, key: str = "--model") -> ModelFacts:
    """What kind of model is in a folder or on the hub, and how large it is.

    Args:
        key: the option or config key that names it, for errors.

    Raises:
        ConfigError: there is none, or it is not of a kind that can be trained.
    """
    located = local_copy(path, key, without=WEIGHTS)
    folder = Path(located)
    if folder.is_dir() and (folder / "adapter_config.json").exists():
        raise ConfigError(f"{key} {path} is an adapter: merge it into its model first (craft-ray merge)")
    if _is_policy(located):
        return ModelFacts(path, "lerobot", parameters=stored_parameters(storage_path(path)))
    try:
        config = transformers.AutoConfig.from_pretrained(located)
    except Exception as error:  # the hub's client and a damaged file may raise anything
        raise ConfigError(
            f"{key} {path}: no config of a model is read from it ({reason(error)}): specify a folder that "
            f"from_pretrained loads, or a hub model"
        ) from None
    kind: Literal["vision_language", "causal_lm"]
    auto_class: Any
    processor_class: Any
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        kind, auto_class = "vision_language", transformers.AutoModelForImageTextToText
        processor_class = transformers.AutoProcessor
    elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind, auto_class = "causal_lm", transformers.AutoModelForCausalLM
        processor_class = transformers.AutoTokenizer
    else:
        raise ConfigError(
            f"{key} {path} is of type {config.model_type}, which is neither a language model nor an image-text-to-"
            f"text model of transformers, nor a policy of LeRobot: choose another model"
        )
    if folder.is_dir():
        located = str(folder.absolute())
    processor = load_processor(processor_class, ModelConfig(kind=kind, path=located))
    with torch.device("meta"):
        module = auto_class.from_config(config)
    text = config.get_text_config()
    # About as many values as a block with attention and gated projections keeps for its backward pass.
    kept = text.num_hidden_layers * (16 * text.hidden_size + 3 * (getattr(text, "intermediate_size", 0) or 0))
    return ModelFacts(
        path,
        kind,
        parameters=sum(p.numel() for p in module.parameters()),
        processor=processor,
        has_template=bool(getattr(processor, "chat_template", None)),
        longest=getattr(text, "max_position_embeddings", None),
        token_bytes=4 * (kept + 3 * text.vocab_size),
    )


def stored_parameters(folder: StoragePath) -> int:
    """Numbers in the safetensors files of a folder, by their headers: eight bytes of length, then JSON.

    https://github.com/huggingface/safetensors#format
    """
    total = 0
    for path in (through_last(folder) if isinstance(folder, ObjectPath) else folder).glob(WEIGHTS):
        with path.open("rb") if isinstance(path, Path) else path.open_input() as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def _is_policy(path: str) -> bool:
    """Whether a LeRobot policy is in a folder or on the hub: its config.json names its type under another key than
    those of transformers do."""
    try:
        found, _ = transformers.PretrainedConfig.get_config_dict(path)
    except Exception:  # nothing there, damaged, or the hub is not reached: loading it reports the reason
        return False
    return "type" in found and "model_type" not in found
