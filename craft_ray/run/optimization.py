"""The optimiser of a run, its learning rate, and the seed of a step: functions of the config and the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.optim import AdamW, Optimizer

from craft_ray.config import TrainConfig


def make_optimizer(parameters: Sequence[torch.Tensor], config: TrainConfig) -> Optimizer:
    """AdamW over all parameters, with the fused kernel, which is the fastest and does not wait for the device."""
    return AdamW(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)


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
