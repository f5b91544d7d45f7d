"""pi05: a PaliGemma with a flow-matching action expert (arXiv 2504.16054). Hidden states are those of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from torch import Tensor

from craft_ray.config import ModelConfig, Precision
from craft_ray.lerobot.folder import PolicyFolder
from craft_ray.lerobot.policy import LANGUAGE, LANGUAGE_MASK, LeRobotPolicy, check_trained, image_tokens
from craft_ray.lerobot.taps import Taps
from craft_ray.method.pooling import Layout


class PI05(LeRobotPolicy):
    """Its sequence is [pictures | text]; the state is part of the text.

    The action expert reads every token of the prompt, so anchors should be spread over all of it. With
    three cameras, `all` is some 800 vectors (7 MB per anchor at two layers), so the default is every eighth.
    """

    default_positions = ("every_8",)

    def __init__(self, config: ModelConfig, precision: Precision, device: torch.device, folder: PolicyFolder) -> None:
        super().__init__(config, precision, device, folder)
        self.hidden_size: int = self._paligemma.config.text_config.hidden_size
        patch = self._paligemma.config.vision_config.patch_size
        self._per_camera = image_tokens(self.settings.image_resolution, patch)

    @property
    def _paligemma(self) -> Any:
        return self.policy.model.paligemma_with_expert.paligemma

    def make_taps(self) -> Taps:
        language = self._paligemma.model.language_model
        return Taps([layer.input_layernorm for layer in language.layers], language.norm)

    def layout(self, encoded: Mapping[str, Tensor], suffix: int) -> Layout:
        seen = len(self.cameras) * self._per_camera
        pictures = len(self.settings.image_features) * self._per_camera
        prompt = pictures + int(encoded[LANGUAGE_MASK].sum())
        return Layout(prompt, prompt, tuple(range(seen)), tuple(range(seen, pictures)))

    def check_anchors(self, modes: Sequence[str], positions: Sequence[str]) -> None:
        super().check_anchors(modes, positions)
        check_trained(self._paligemma, self.settings)

    def run_prompt(self, inputs: Mapping[str, Tensor]) -> None:
        core = self.policy.model
        images, masks = self.policy._preprocess_images(inputs)
        embedded, real, attention = core.embed_prefix(images, masks, inputs[LANGUAGE], inputs[LANGUAGE_MASK])
        embedded = embedded.to(self._paligemma.model.language_model.layers[0].self_attn.q_proj.weight.dtype)
        core.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(real, attention), dtype=embedded.dtype),
            position_ids=torch.cumsum(real, dim=1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=False,
        )
