"""The optimiser of a run, its learning rate, and the seed of a step: functions of the config and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from craft_ray.config import TrainConfig
from craft_ray.errors import ConfigError
from craft_ray.extras import install, missing
from craft_ray.models.base import Model
from craft_ray.models.capabilities import PresetModel
from craft_ray.models.compiling import require_compiler


@dataclass(frozen=True)
class Optimization:
    """An optimiser with its learning rate, which is a function of the step, so that it needs no state."""

    optimizer: Optimizer
    rates: Callable[[int], list[float]]
    """The learning rate of each parameter group at a step, from 0."""
    max_norm: float | None
    described: str | None
    """The preset of a policy in a line; None: the config says everything."""

    def set_rate(self, step: int) -> float:
        """Set the learning rates of a step (from 0), and return the first, which is logged."""
        rates = self.rates(step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # a compiled optimiser would compile again for a new number
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return rates[0]

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, and the preset that it belongs to."""
        return self.optimizer.state_dict() | {"preset": self.described}

    def check_preset(self, state: dict[str, Any]) -> None:
        """Check that a state continues with the preset that it was written under.

        Raises:
            ConfigError: the policy prescribed something else when it was written.
        """
        preset = state.get("preset")
        if preset != self.described:
            raise ConfigError(
                f"the run started with another preset in its policy's config.json ({preset}), it is now: "
                f"{self.described}: restore the file, or start a new run"
            )


def make_optimization(model: Model, parameters: Sequence[torch.Tensor], config: TrainConfig) -> Optimization:
    """AdamW over all parameters, with the fused kernel, which is the fastest and does not wait for the device; or the
    optimiser of the model's own preset.

    Raises:
        ConfigError: the model's preset is neither Adam nor AdamW.
    """
    if config.optimizer == "policy":
        assert isinstance(model, PresetModel), "the config allows a preset only for models that have one"
        preset = model.optimizer_preset(config.steps)
        optimised = {id(p) for group in preset.optimizer.param_groups for p in group["params"]}
        assert optimised == {id(p) for p in parameters}, "the preset leaves parameters out"
        return Optimization(preset.optimizer, preset.rates, preset.max_norm, preset.described)
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    optimizer = (
        _adamw_8bit(parameters, settings)
        if config.optimizer == "adamw_8bit"
        else AdamW(parameters, **settings, fused=True)
    )
    return Optimization(optimizer, lambda step: [learning_rate(step, config)], config.max_grad_norm, None)


def _adamw_8bit(parameters: Sequence[torch.Tensor], settings: dict[str, Any]) -> Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al., arXiv 2110.02861), by torchao, which compiles its update."""
    if reason := missing("torchao"):
        raise ConfigError(f"train.optimizer is adamw_8bit, but {reason}: {install('8bit')}")
    require_compiler("train.optimizer is adamw_8bit", parameters[0].device)
    from torchao.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(parameters, **settings)
    return optimizer


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step (from 0): linear warm-up, then constant, or linear or cosine decay to zero at the end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * factor[config.schedule]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make a step's random numbers depend on these three alone, so that no generator state has to be saved."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + rank) % (1 << 63))
