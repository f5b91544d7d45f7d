"""A small world for the tests of the method: losses with known gradients, and one step on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from craft_ray.config import CraftConfig
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import GradientPair
from craft_ray.method.step import StepMetrics, craft_step
from craft_ray.workers import OneWorker

ONE = OneWorker()

PINNED: dict[str, Any] = {
    "initial_lambda": 1.0,
    "lambda_lr": 0.5,
    "lambda_max": 100.0,
    "lambda_floor": 0.0,
    "violation_clip": 1.0,
    "retention_ema": 0.0,
    "epsilon_start": 0.05,
    "conflict_threshold": -0.1,
    "projection_gate": "violated",
    "projection_mode": "weighted",
}


def craft_config(**settings: Any) -> CraftConfig:
    """Settings that do not follow a change of a default."""
    return CraftConfig(**PINNED | settings)


@dataclass(frozen=True)
class Terms:
    """A micro-batch in which only the number of terms matters."""

    count: int = 1


@dataclass(frozen=True)
class Batch:
    """Samples with targets; the loss is a mean over them."""

    x: Tensor
    y: Tensor

    @property
    def count(self) -> int:
        return len(self.x)

    def split(self, *sizes: int) -> list[Batch]:
        return [Batch(x, y) for x, y in zip(self.x.split(sizes), self.y.split(sizes), strict=True)]


def squared_error(module: Callable[[Tensor], Tensor]) -> Callable[[Batch], Tensor]:
    return lambda batch: (module(batch.x) - batch.y).square().mean()


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 3))


def batch(seed: int, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(size, 5, generator=generator), torch.randn(size, 3, generator=generator))


def named(parameters: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"p{i}", p) for i, p in enumerate(parameters)]


def linear_loss(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], value: float = 1.0
) -> Callable[[Any], Tensor]:
    """A loss with this value and these gradients; None where it does not reach the parameter."""

    def loss(_: Any) -> Tensor:
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        total = torch.stack([(p.float() * g.float()).sum() for p, g in pairs]).sum()
        return total - total.detach() + value

    return loss


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step: the gradient of each parameter that it gave to the optimiser."""

    gradients: list[Tensor | None]
    metrics: StepMetrics
    state: DualState

    @property
    def flat(self) -> Tensor:
        return torch.cat([g.flatten() for g in self.gradients if g is not None])


def step_on(
    task: Sequence[Tensor | None],
    retention: Sequence[Tensor | None],
    *,
    multiplier: float = 0.0,
    retention_loss: float = 1.0,
    epsilon: float = 0.5,
    noise_floor: float = 0.0,
    max_norm: float | None = None,
    **craft: Any,
) -> Outcome:
    """One craft_step on losses with these gradients. With the defaults the budget is exceeded."""
    parameters = [
        nn.Parameter(torch.zeros_like(t if t is not None else r))
        for t, r in zip(task, retention, strict=True)
        if t is not None or r is not None
    ]
    config = craft_config(initial_lambda=multiplier, **craft)
    gradients = GradientPair(named(parameters))
    state, metrics = craft_step(
        linear_loss(parameters, task),
        [Terms()],
        linear_loss(parameters, retention, retention_loss),
        [Terms()],
        DualState.start(config),
        epsilon,
        craft=config,
        optimizer=torch.optim.SGD(parameters, lr=1.0),
        gradients=gradients,
        workers=ONE,
        max_norm=max_norm,
        noise_floor=noise_floor,
    )
    return Outcome([p.grad for p in parameters], metrics, state)
