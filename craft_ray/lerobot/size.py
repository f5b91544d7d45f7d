"""PaliGemmas of any size inside LeRobot's pi0_fast, which itself builds only the one with three billion parameters.

The size is in `paligemma_size.json` next to the policy's `config.json`. LeRobot loads such a folder in this context:

    with sized(folder):
        policy = PI0FastPolicy.from_pretrained(folder)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.policies.pi0_fast import modeling_pi0_fast
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma
from torch import nn
from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

from craft_ray.errors import ConfigError

SIZE_FILE = "paligemma_size.json"


@dataclass(frozen=True)
class PaliGemmaSize:
    """The dimensions of a PaliGemma.

    Raises:
        ConfigError: no model can have these dimensions.
    """

    width: int
    """Size of the language model's hidden states, and of a picture's tokens after the projection."""
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vision_width: int
    vision_depth: int
    vision_mlp: int
    vision_heads: int
    patch: int
    """Side of a patch, in pixels: each becomes one token."""
    image: int
    """Side of a picture, in pixels; the policy's `image_resolution` is (image, image)."""
    vocabulary: int
    """Number of tokens for text and actions, plus the reserved ones."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"a PaliGemma's {field.name} is {value!r}: give a whole number above 0")
        for whole, part in (("image", "patch"), ("vision_width", "vision_heads"), ("heads", "kv_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"a PaliGemma's {whole} is {getattr(self, whole)} and its {part} {getattr(self, part)}: choose a "
                    f"multiple"
                )
        if self.head_dim % 2:
            raise ConfigError(f"a PaliGemma's head_dim is {self.head_dim}: its rotary positions need an even one")

    def save(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (folder / SIZE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> PaliGemmaSize:
        """
        Raises:
            ConfigError: the file holds other fields, or dimensions that no model can have.
        """
        try:
            return cls(**json.loads((folder / SIZE_FILE).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder / SIZE_FILE} does not hold the size of a PaliGemma ({error}): take the file that was saved "
                f"with the policy"
            ) from None


@contextmanager
def sized(folder: str | Path) -> Iterator[None]:
    """While open, LeRobot builds its `PI0FastPolicy` in the size stored in `folder`; without that file, in its own.

    This affects the whole process, not just one thread.

    Raises:
        ConfigError: as `PaliGemmaSize.load`.
    """
    if not (Path(folder) / SIZE_FILE).is_file():
        yield
        return
    with building(PaliGemmaSize.load(Path(folder))):
        yield


@contextmanager
def building(size: PaliGemmaSize) -> Iterator[None]:
    """`sized`, for a policy that has no folder yet."""
    original = modeling_pi0_fast.PI0FastPaliGemma

    class SizedPaliGemma(original):  # type: ignore[misc, valid-type]
        def __init__(self, vlm_config: Any, use_adarms: Any = None, precision: str = "bfloat16") -> None:
            nn.Module.__init__(self)  # the original would first build three billion parameters
            self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(_configuration(size))
            self.to_bfloat16_for_selected_params(precision)

    modeling_pi0_fast.PI0FastPaliGemma = SizedPaliGemma
    try:
        yield
    finally:
        modeling_pi0_fast.PI0FastPaliGemma = original


def _configuration(size: PaliGemmaSize) -> PaliGemmaConfig:
    """PaliGemma's configuration as LeRobot writes it, with the dimensions of `size`."""
    text = GemmaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        dtype="float32",
    )
    vision = SiglipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_depth,
        num_attention_heads=size.vision_heads,
        patch_size=size.patch,
        image_size=size.image,
        vision_use_head=False,
        dtype="float32",
    )
    return PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=size.vocabulary,  # never embedded: pictures come in as vectors
        projection_dim=size.width,
        hidden_size=size.width,
    )
