"""smolvla: the lower half of a SmolVLM2 with a flow-matching action expert (arXiv 2506.01844).

By LeRobot's default, only the expert is trained (`train_expert_only`), and the hidden states of the prompt then do not
change at all: anchors constrain only a policy whose vision-language part is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks
from torch import Tensor

from craft_ray.config import ModelConfig, Precision
from craft_ray.lerobot.folder import PolicyFolder
from craft_ray.lerobot.policy import LANGUAGE, LANGUAGE_MASK, LeRobotPolicy, check_trained
from craft_ray.lerobot.taps import Taps
from craft_ray.method.pooling import Layout


class SmolVLA(LeRobotPolicy):
    """Its sequence is [pictures | text | state]. The state takes the place of a suffix, and no position includes it.

    The action expert reads every token, and there are few (64 per camera), so by default all are anchored.
    """

    counts_steps = True

    def __init__(self, config: ModelConfig, precision: Precision, device: torch.device, folder: PolicyFolder) -> None:
        super().__init__(config, precision, device, folder)
        vlm = self._vlm.config
        # LeRobot would pad to it, to have one length for a compiler. Padding is not attended to.
        self.policy.model.prefix_length = -1
        self.hidden_size: int = vlm.text_config.hidden_size
        width, height = self.settings.resize_imgs_with_padding
        patch, scale = vlm.vision_config.patch_size, vlm.scale_factor
        tokens = (height // patch) * (width // patch) // scale**2
        start, end = (2, 1) if self.settings.add_image_special_tokens else (0, 0)
        self._per_camera, self._picture = start + tokens + end, range(start, start + tokens)

    @property
    def _vlm(self) -> Any:
        return self.policy.model.vlm_with_expert.vlm

    def make_taps(self) -> Taps:
        text = self._vlm.model.text_model
        return Taps([layer.input_layernorm for layer in text.layers], text.norm)

    def layout(self, encoded: Mapping[str, Tensor], suffix: int) -> Layout:
        seen = [camera * self._per_camera + t for camera in range(len(self.cameras)) for t in self._picture]
        pictures = len(self.settings.image_features) * self._per_camera
        prompt = pictures + int(encoded[LANGUAGE_MASK].sum())
        absent = range(len(self.cameras) * self._per_camera, pictures)
        return Layout(prompt + 1, prompt, tuple(seen), tuple(absent), given=1)

    def check_anchors(self, modes: Sequence[str], positions: Sequence[str]) -> None:
        super().check_anchors(modes, positions)
        check_trained(self._vlm, self.settings)

    def run_prompt(self, inputs: Mapping[str, Tensor]) -> None:
        core = self.policy.model
        images, masks = self.policy.prepare_images(inputs)
        embedded, real, attention = core.embed_prefix(
            images, masks, inputs[LANGUAGE], inputs[LANGUAGE_MASK], state=self.policy.prepare_state(inputs)
        )
        core.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(real, attention),
            position_ids=torch.cumsum(real, dim=1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=True,  # as LeRobot's inference does; without it the layers of the expert are called
        )
