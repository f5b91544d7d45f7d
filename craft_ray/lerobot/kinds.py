"""The supported types of policies, and how the policy of a folder is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from craft_ray.config import ModelConfig, Precision
from craft_ray.lerobot.act import ACT
from craft_ray.lerobot.folder import SUPPORTED, PolicyFolder, load_folder
from craft_ray.lerobot.pi0_fast import PI0Fast
from craft_ray.lerobot.pi05 import PI05
from craft_ray.lerobot.policy import LeRobotPolicy
from craft_ray.lerobot.sharding import blocks_of
from craft_ray.lerobot.smolvla import SmolVLA
from craft_ray.models.sharding import load_sharded

KINDS: dict[str, type[LeRobotPolicy]] = {"pi0_fast": PI0Fast, "pi05": PI05, "smolvla": SmolVLA, "act": ACT}
"""By LeRobot's name of the type."""
assert KINDS.keys() == set(SUPPORTED), "SUPPORTED, by which a folder is refused before it is loaded, names other types"


def load_policy(
    config: ModelConfig,
    precision: Precision,
    device: torch.device,
    weights: str | None,
    mesh: DeviceMesh | None = None,
) -> LeRobotPolicy:
    """Load the policy of a configuration, in training mode.

    Args:
        mesh: the workers that share its weights.

    Raises:
        ConfigError: no policy loads from the path, or its type is not supported.
        ModelError: its weights do not load completely.
    """

    def shared(load: Callable[[], Any], empty: Callable[[], Any]) -> Any:
        assert mesh is not None
        return load_sharded(load, empty, mesh, precision, device, blocks_of)

    return policy_of(config, precision, device, load_folder(config, device, weights, shared if mesh else None))


def policy_of(config: ModelConfig, precision: Precision, device: torch.device, found: PolicyFolder) -> LeRobotPolicy:
    """Wrap the contents of a folder in the interface of its type of policy."""
    return KINDS[found.policy.name](config, precision, device, found)
