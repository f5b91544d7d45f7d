"""One update of the weights under the constraints of a run. The step itself is `craft_ray.method.step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from craft_ray.method.gradients import RETENTION, TASK, Counted, GradientPair
from craft_ray.method.step import StepMetrics, craft_step, task_step
from craft_ray.method.surgery import merged_norm
from craft_ray.retention.constraint import Constraint
from craft_ray.retention.mode import Terms
from craft_ray.workers import Workers


def enforced(constraints: Sequence[Constraint]) -> list[Constraint]:
    """Those that training is held to, rather than only measured against."""
    return [constraint for constraint in constraints if constraint.held]


def held_by(constraints: Sequence[Constraint]) -> Constraint | None:
    """The constraint that training is held to; None in plain fine-tuning."""
    held = enforced(constraints)
    assert len(held) <= 1, "one multiplier per run"
    return held[0] if held else None


def observe(constraints: Sequence[Constraint], validation: dict[str, Any]) -> None:
    """Let the budgets follow what a validation measured, and note them in its record."""
    for constraint in enforced(constraints):
        constraint.observe(validation)
        if constraint.share is not None:
            validation["craft/next_epsilon"] = constraint.share.epsilon


def stationarity(
    task_loss: Callable[[Any], Tensor],
    task: Sequence[Counted],
    constraint: Constraint,
    anchors: Sequence[Terms],
    *,
    gradients: GradientPair,
    workers: Workers,
) -> float:
    """|g_t + lambda g_r| / |g_t|: 0 at a solution where the budget binds, 1 where lambda is 0 or the gradients are
    orthogonal. It is as noisy as the batch is small.

    Args:
        task, anchors: this worker's micro-batches on its device.
    """
    assert constraint.dual is not None
    gradients.backward(TASK, task_loss, task, workers)
    gradients.backward(RETENTION, constraint.mode.loss, anchors, workers)
    gram = gradients.gram()
    return float(merged_norm(gram, 1.0, constraint.dual.multiplier) / gram.task_sq.sqrt())


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
