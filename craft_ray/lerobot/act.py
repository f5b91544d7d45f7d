"""ACT: a transformer encoder over a robot's state and pictures, and a decoder to actions (arXiv 2304.13705)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from craft_ray.config import ModelConfig, Precision
from craft_ray.errors import ConfigError
from craft_ray.lerobot.folder import PolicyFolder
from craft_ray.lerobot.policy import LeRobotPolicy
from craft_ray.lerobot.taps import Taps
from craft_ray.method.pooling import Layout
from craft_ray.models.base import Batch, evaluating
from craft_ray.models.sharding import gathered


class ACT(LeRobotPolicy):
    """The encoder's sequence is [latent | state | pictures]. There is no text, and the task is ignored.

    The decoder reads every token, so by default all are anchored: some 300 per camera of 480 x 640 pixels (0.6 MB
    per anchor at two layers of the usual width of 512).
    """

    counts_steps = True
    one_size = True

    def __init__(self, config: ModelConfig, precision: Precision, device: torch.device, folder: PolicyFolder) -> None:
        super().__init__(config, precision, device, folder)
        self.hidden_size: int = self.settings.dim_model
        self._before = 1 + sum(
            feature is not None for feature in (self.settings.robot_state_feature, self.settings.env_state_feature)
        )
        self._pictures = sum(self._tokens(name) for name in self.cameras)

    def _tokens(self, camera: str) -> int:
        """Tokens of one picture: the pixels of the backbone's last feature map."""
        picture = torch.zeros(1, *self.features[camera], device=self.device)
        with torch.no_grad(), self.autocast():
            map_BCHW = gathered(self.module, lambda: self.policy.model.backbone(picture)["feature_map"])
        return int(map_BCHW.shape[2] * map_BCHW.shape[3])

    def make_taps(self) -> Taps:
        encoder: Any = self.policy.model.encoder
        return Taps(list(encoder.layers), encoder.norm)

    def layout(self, encoded: Mapping[str, Tensor], suffix: int) -> Layout:
        length = self._before + self._pictures
        return Layout(length, length, tuple(range(self._before, length)))

    def run_prompt(self, inputs: Mapping[str, Tensor]) -> None:
        # In training mode the latent is sampled from an encoding of the actions; in eval mode it is zero, as in use.
        pictures = {"observation.images": [inputs[name] for name in self.cameras]} if self.cameras else {}
        with evaluating(self.module):
            self.policy.model({**inputs, **pictures})

    def hidden_states(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        return [hidden_SBD.transpose(0, 1) for hidden_SBD in super().hidden_states(batch, layers)]

    def predict(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.settings.temporal_ensemble_coeff is not None:
            raise ConfigError(
                f"model.path {self.folder.path} averages its predictions over time steps (temporal_ensemble_coeff "
                f"{self.settings.temporal_ensemble_coeff}), but a rollout asks for each time step alone: set it to "
                f"null in its config.json"
            )
        return super().predict(inputs)
