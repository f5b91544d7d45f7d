"""Models: the interface (`base.Model`) and what implements it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from craft_ray.models.base import Model
from craft_ray.quiet import uncollected

if TYPE_CHECKING:  # craft_ray.models.packing needs only torch and transformers, not pydantic
    from craft_ray.config import ModelConfig, Precision


def load_model(
    config: ModelConfig, precision: Precision, device: torch.device | str = "cpu", weights: str | None = None
) -> Model:
    """The model of a configuration, in training mode.

    Args:
        precision: arithmetic of its forward passes; teacher and student must use the same.
        weights: another folder to take the weights from (a checkpoint); processor and limits are still the config's.

    Raises:
        ConfigError: nothing loads from the path.
        ModelError: its weights do not load completely.
    """
    from craft_ray.extras import require_lerobot

    with uncollected():
        from craft_ray.models.causal_lm import CausalLM
        from craft_ray.models.vision_language import VisionLanguageModel
    from craft_ray.storage.node_cache import local_copy

    merged = tuple(local_copy(path, "model.merge_statistics") for path in config.merge_statistics)
    config = config.model_copy(update={"path": local_copy(config.path, "model.path"), "merge_statistics": merged})
    weights = None if weights is None else local_copy(weights, "a checkpoint")
    if config.kind == "lerobot":
        require_lerobot("model.kind is lerobot")
        with uncollected():
            from craft_ray.lerobot.kinds import load_policy

        return load_policy(config, precision, torch.device(device), weights)
    kinds: dict[str, type[CausalLM] | type[VisionLanguageModel]]
    kinds = {"causal_lm": CausalLM, "vision_language": VisionLanguageModel}
    return kinds[config.kind](config, precision, torch.device(device), weights)
