"""The budget epsilon as a function of the step, and the multiplier lambda that enforces it.

    m      <- beta m + (1 - beta) L_ret,   L = m / (1 - beta^n)      running mean, unbiased from the first value
    e      =  L/epsilon - 1   (relative)   or   L - epsilon  (absolute),   bounded to [-clip, clip]
    I      <- I + eta e       unless lambda is at an end of [0, lambda_max] and e pushes outwards (anti-windup)
    lambda =  min(max(I + kappa e, 0), lambda_max)                   kappa = 0: projected dual ascent

The relative violation makes one eta fit every model; its bound limits lambda's rate to eta per retention step:
after the first violated steps L/epsilon is in the hundreds, and an unbounded step drives lambda to its cap and leaves
it there (measured in docs/method.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the method itself needs only torch
    from craft_ray.config import CraftConfig


def epsilon_at(step: int, steps: int, craft: CraftConfig) -> float:
    """The budget at `step` (from 0) of a run of `steps` steps.

    With p = min(step / decay, 1), where decay is epsilon_decay_steps, or the part epsilon_decay of the run, whose last
    step is steps - 1; without either it is the whole run:
    linear start + (end - start) p; cosine end + (start - end)(1 + cos(pi p))/2;
    exponential end + (start - end) exp(-5 p), which falls to 0.7 % of the way above `end`, and is `end` from p = 1.
    """
    start, end = craft.epsilon_start, craft.epsilon_final
    decay = craft.epsilon_decay_steps or (craft.epsilon_decay or 1.0) * max(steps - 1, 1)
    progress = min(step / decay, 1.0)
    if craft.epsilon_schedule == "constant":
        return start
    if progress == 1.0:
        return end
    if craft.epsilon_schedule == "linear":
        return start + (end - start) * progress
    if craft.epsilon_schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    if craft.epsilon_schedule == "exponential":
        return end + (start - end) * math.exp(-5 * progress)
    raise ValueError(f"unknown epsilon_schedule '{craft.epsilon_schedule}': constant, linear, cosine or exponential")


def epsilon_reached(steps: int, craft: CraftConfig) -> float:
    """The budget at the last step of a run: `epsilon_end`, unless the decay outlasts the run."""
    return epsilon_at(steps - 1, steps, craft)


@dataclass(frozen=True)
class DualState:
    """The multiplier's state between two retention steps: float64 on the device, scalars for one constraint, [S] for
    those of S constraints together."""

    multiplier: Tensor
    integral: Tensor
    moment: Tensor
    """m, the biased running sum of L_ret."""
    weight: Tensor
    """1 - beta^n, the divisor that unbiases m."""

    @classmethod
    def start(cls, craft: CraftConfig, device: torch.device | str = "cpu") -> DualState:
        def scalar(value: float) -> Tensor:
            return torch.tensor(value, dtype=torch.float64, device=device)

        return cls(scalar(craft.lambda_start), scalar(craft.lambda_start), scalar(0.0), scalar(0.0))

    @classmethod
    def together(cls, states: Sequence[DualState]) -> DualState:
        """The states of several constraints as one, [S]."""
        return cls(*(torch.stack([getattr(state, field.name) for state in states]) for field in fields(cls)))

    def apart(self) -> list[DualState]:
        """The states that `together` joined."""
        return [DualState(*parts) for parts in zip(*(getattr(self, f.name) for f in fields(self)), strict=True)]

    @property
    def mean_loss(self) -> Tensor:
        """The running mean of L_ret; NaN before the first value."""
        return self.moment / self.weight

    def observe(self, retention_loss: Tensor, craft: CraftConfig) -> DualState:
        """The state after one more value of L_ret."""
        beta = craft.retention_ema
        moment = beta * self.moment + (1 - beta) * retention_loss.double()
        weight = beta * self.weight + (1 - beta)
        return DualState(self.multiplier, self.integral, moment, weight)

    def ascend(self, epsilon: float | Tensor, craft: CraftConfig) -> DualState:
        """The state after one step of dual ascent on the violation of the observed mean."""
        mean = self.mean_loss
        violation = mean / epsilon - 1 if craft.violation == "relative" else mean - epsilon
        if craft.violation_clip is not None:
            violation = violation.clamp(-craft.violation_clip, craft.violation_clip)
        outwards = ((self.multiplier >= craft.lambda_max) & (violation > 0)) | (
            (self.multiplier <= 0) & (violation < 0)
        )
        integral = self.integral + torch.where(outwards, 0.0, craft.lambda_lr * violation)
        integral = integral.clamp(0.0, craft.lambda_max)
        multiplier = (integral + craft.lambda_kp * violation).clamp(0.0, craft.lambda_max)
        return DualState(multiplier, integral, self.moment, self.weight)

    def scaled(self, factor: float, craft: CraftConfig) -> DualState:
        """The state with lambda times a factor, within [0, lambda_max]."""
        multiplier = (self.multiplier * factor).clamp(max=craft.lambda_max)
        return DualState(multiplier, (self.integral * factor).clamp(max=craft.lambda_max), self.moment, self.weight)

    def state_dict(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device | str) -> DualState:
        return cls(**{name: tensor.to(device) for name, tensor in state.items()})
