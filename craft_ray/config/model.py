"""The model that is fine-tuned."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from craft_ray.config.paths import PathOrHubName
from craft_ray.config.types import Section


class ModelConfig(Section):
    """The model: the teacher before fine-tuning, the student after."""

    kind: Literal["vision_language", "causal_lm", "lerobot"] = "causal_lm"
    """`vision_language` loads AutoModelForImageTextToText, `causal_lm` loads AutoModelForCausalLM, `lerobot` a policy
    of LeRobot with its processors (docs/lerobot.md; needs the extra `lerobot`)."""
    path: PathOrHubName
    """A folder (local, on a shared mount, or s3://) or a hub name."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Keep float32 for training; `train.precision` sets the type of the arithmetic."""
    max_length: int = Field(512, ge=2)
    """Longest sequence in tokens, including images and suffix. A longer sample is an error, it is never truncated. A
    policy of LeRobot has its own limits (`tokenizer_max_length`, `max_action_tokens`), equally strict."""
    image_processor: dict[str, Any] = {}
    """Settings of the image processor in place of the folder's, for `vision_language`: `{do_pan_and_scan: true}`,
    `{do_image_splitting: false}`, `{size: {shortest_edge: 3136, longest_edge: 602112}}` (docs/models.md)."""
    chat_template: bool = False
    """Format prompts with the model's own chat template."""
    append_eos: bool = True
    """Whether a response ends with the end-of-sequence token. Off for running text."""
    disable_dropout: bool = True
    """Turn dropout off. Anchors compare student and teacher; dropout would count as forgetting."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    """How transformers computes attention; default: its own choice, `sdpa` if the model has it.
    `flash_attention_2` needs the package flash-attn and bfloat16, `flex_attention` trains only on a GPU."""
    compile: bool = False
    """Compile the model's layers for training (torch.compile). Checks, scores and generation run uncompiled, and what
    is saved does not change. The first steps take minutes, and so does each new shape of a batch."""
    merge_statistics: tuple[PathOrHubName, ...] = ()
    """LeRobotDatasets (folders or hub names) whose statistics widen those of a policy's normaliser. By default the
    teacher's own statistics stay unchanged, whatever the new data are."""

    @property
    def on_host(self) -> Self:
        """The same weights for a process that trains nothing: without what only decides how a GPU computes."""
        return self.model_copy(update={"attention": None, "compile": False})

    @model_validator(mode="after")
    def _images_are_read(self) -> Self:
        if self.image_processor and self.kind != "vision_language":
            raise ValueError(
                f"image_processor has {', '.join(self.image_processor)}, but kind is {self.kind}, which reads images "
                f"with no processor of its own: leave it out, or set kind: vision_language"
            )
        return self
