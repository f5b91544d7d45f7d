"""One update of the weights under the constraints of a run. The step itself is `craft_ray.method.step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from craft_ray.method.gradients import Counted, GradientPair
from craft_ray.method.step import StepMetrics, craft_step, task_step
from craft_ray.retention.constraint import Constraint
from craft_ray.retention.mode import Terms
from craft_ray.workers import Workers


def held_by(constraints: Sequence[Constraint]) -> Constraint | None:
    """The constraint that training is held to; None in plain fine-tuning."""
    held = [constraint for constraint in constraints if constraint.held]
    assert len(held) <= 1, "one multiplier per run"
    return held[0] if held else None


def update(
    task_loss: Callable[[Any], Tensor],
    task: Sequence[Counted],
    constraints: Sequence[Constraint],
    anchors: Sequence[Terms] | None,
    step: int,
    *,
    optimizer: Optimizer,
    gradients: GradientPair,
    workers: Workers,
    max_norm: float | None,
) -> StepMetrics:
    """Take step `step` (from 0): a CRaFT step if a constraint is held, otherwise plain fine-tuning.

    Args:
        task, anchors: this worker's micro-batches on its device; `anchors` is None between two retention steps.
    """
    constraint = held_by(constraints)
    if constraint is None:
        loss, norm = task_step(
            task_loss, task, optimizer=optimizer, gradients=gradients, workers=workers, max_norm=max_norm
        )
        nan = loss.new_full((), float("nan"))
        return StepMetrics(loss, norm, nan, nan, nan, nan, nan, nan, nan)
    assert constraint.dual is not None
    constraint.dual, metrics = craft_step(
        task_loss,
        task,
        constraint.mode.loss,
        anchors,
        constraint.dual,
        constraint.epsilon(step),
        craft=constraint.craft,
        optimizer=optimizer,
        gradients=gradients,
        workers=workers,
        max_norm=max_norm,
        noise_floor=constraint.noise_floor,
    )
    return metrics
