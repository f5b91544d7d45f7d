"""One step of CRaFT.

    minimise L_task(theta)   subject to   L_ret(theta) <= epsilon_t

    g_t, g_r = grad L_task, grad L_ret                       each averaged over all workers, once
    L        = running mean of L_ret
    if cos(g_t, g_r) < tau and the gate is open:
        g_t <- g_t - (<g_t, g_r>/|g_r|^2) g_r                one-sided projection
    w        = max(lambda, rho |g_t|/|g_r|)              rho < 1: a floor that moves no solution (surgery.py)
    theta   <- AdamW(theta, clip(merge(g_t, K g_r, w)))
    lambda  <- clip(lambda + eta (L/epsilon_t - 1), 0, lambda_max)

The retention gradient is computed every K-th step and counts K times, once for each of them: so the Lagrangian that is
descended on average, and with it the meaning of lambda, does not depend on K. Several constraints have L, epsilon and
lambda of their own, and share one backward pass: with Lambda = sum_i lambda_i, g_r is the gradient of
sum_i (lambda_i / Lambda) L_i, and is merged with Lambda. With the violation bounded (dual.py),
lambda neither diverges nor runs to its cap; docs/method.md has measurements of the alternatives.

Without the projection, the floor, and the angle in the log (`compares_gradients`), nothing needs the two gradients
apart: that of a L_task + K b L_ret, with the merge's a and b, accumulates in one row.

All numbers of the step stay on the device; the caller reads them when it writes its log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from craft_ray.method import surgery
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import RETENTION, TASK, AllReduce, Counted, GradientPair

if TYPE_CHECKING:  # the method itself needs only torch
    from craft_ray.config import CraftConfig

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class StepMetrics:
    """Scalars on the device; NaN where a step without retention has no value."""

    task_loss: Tensor
    grad_norm: Tensor
    retention_loss: Tensor
    multiplier: Tensor
    """lambda after this step's update: what the next step is taken with."""
    weight: Tensor
    """What the merge weighted g_r with in this step, apart from K: with `weighted`, lambda before its update or its
    floor."""
    dot: Tensor
    cos: Tensor
    conflict: Tensor
    """Whether the cosine (or, by choice, the dot product) is below the threshold."""
    projected: Tensor
    """Whether the conflict was projected away; the gate decides."""
    skills_2S: Tensor | None = None
    """With several constraints, each one's L_ret and lambda. `retention_loss` is then the mean that was descended, and
    `multiplier` the sum."""


def task_step(
    task_loss: Loss,
    task: Sequence[Counted],
    *,
    optimizer: Optimizer,
    gradients: GradientPair,
    workers: AllReduce,
    max_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """Plain fine-tuning: the baseline arm, and the steps between two retention steps.

    Returns:
        The loss and the gradient's norm before clipping.
    """
    loss = gradients.backward(TASK, task_loss, task, workers)
    gradients.assign_grads(workers)
    norm = gradients.clip(max_norm)
    optimizer.step()
    return loss, norm


def craft_step(
    task_loss: Loss,
    task: Sequence[Counted],
    retention_loss: Loss,
    anchors: Sequence[Any] | None,
    state: DualState,
    epsilon: float | Tensor,
    *,
    craft: CraftConfig,
    optimizer: Optimizer,
    gradients: GradientPair,
    workers: AllReduce,
    max_norm: float | None,
    noise_floor: float | Tensor = 0.0,
) -> tuple[DualState, StepMetrics]:
    """One step of the constrained problem above.

    Args:
        task_loss, retention_loss: from a micro-batch to its mean loss; with several constraints `retention_loss` gives
            the sums of their terms, [S].
        task, anchors: the micro-batches of this worker; `anchors` is None between two retention steps.
        state: of the constraint, or of several together.
        epsilon: the budget at this step, or the budgets [S].
        max_norm: the merged gradient is clipped to it, once.
        noise_floor: L_ret up to this is the cache's rounding error, and its gradient has no meaningful direction.

    Returns:
        The multiplier's next state, and the metrics of the step.
    """
    if anchors is None:
        loss, norm = task_step(
            task_loss, task, optimizer=optimizer, gradients=gradients, workers=workers, max_norm=max_norm
        )
        nan = loss.new_full((), torch.nan)
        return state, StepMetrics(loss, norm, nan, state.multiplier.sum(), nan, nan, nan, nan, nan)

    several = state.multiplier.ndim > 0
    shares = part_of_sum(state.multiplier) if several else None
    if not compares_gradients(craft):
        a, b = surgery.merge(craft.projection_mode, state.multiplier.sum())
        c = craft.retention_freq * b
        if shares is None:
            loss, l_ret = gradients.backward_sum([(a, task_loss, task), (c, retention_loss, anchors)], workers)
        else:
            loss, l_ret = gradients.backward_sum([(a, task_loss, task)], workers, (c * shares, retention_loss, anchors))
        gradients.assign_grads(workers)
        norm = gradients.clip(max_norm)
        optimizer.step()
        nan = loss.new_full((), torch.nan)
        following = state.observe(l_ret, craft).ascend(epsilon, craft)
        mean, skills = _of_several(l_ret, shares, following)
        return following, StepMetrics(loss, norm, mean, following.multiplier.sum(), b, nan, nan, nan, nan, skills)

    def retention_gradient() -> Tensor:
        if shares is None:
            return gradients.backward(RETENTION, retention_loss, anchors, workers)
        return gradients.backward_parts(RETENTION, retention_loss, anchors, shares, workers)

    if gradients.retention_first:
        l_ret = retention_gradient()
    loss = gradients.backward(TASK, task_loss, task, workers)
    if not gradients.retention_first:
        l_ret = retention_gradient()
    state = state.observe(l_ret, craft)

    gram = gradients.gram()
    directed = (l_ret > noise_floor).any()
    cos = torch.where(directed, gram.cos, torch.nan)
    compared = torch.where(directed, gram.dot, torch.nan) if craft.conflict_measure == "dot" else cos
    conflict = compared < craft.conflict_threshold
    projected = conflict & gate(state, epsilon, craft)

    removed = surgery.projection(gram, projected)
    multiplier = state.multiplier.sum()
    floored = torch.where(directed, surgery.floored(multiplier, gram, craft.lambda_floor), multiplier)
    a, b = surgery.merge(craft.projection_mode, floored)
    c = craft.retention_freq * b - a * removed
    norm = surgery.merged_norm(gram, a, c)
    scale = surgery.clip_factor(norm, max_norm)
    gradients.combine(scale * a, scale * c)

    gradients.assign_grads(workers)
    optimizer.step()
    state = state.ascend(epsilon, craft)
    mean, skills = _of_several(l_ret, shares, state)
    return state, StepMetrics(loss, norm, mean, state.multiplier.sum(), b, gram.dot, cos, conflict, projected, skills)


def _of_several(l_ret: Tensor, shares_S: Tensor | None, following: DualState) -> tuple[Tensor, Tensor | None]:
    """The mean that was descended, and each skill's L_ret and lambda; for one constraint L_ret itself, and None."""
    if shares_S is None:
        return l_ret, None
    return (shares_S * l_ret).sum(), torch.stack([l_ret.double(), following.multiplier])


def part_of_sum(multiplier_S: Tensor) -> Tensor:
    """lambda_i / sum_j lambda_j; equal parts while all are 0, so that a floor holds every skill."""
    total = multiplier_S.sum()
    return torch.where(total > 0, multiplier_S / total, 1 / len(multiplier_S))


def compares_gradients(craft: CraftConfig) -> bool:
    """Whether a step needs the two gradients apart, and so a pair with two rows."""
    return craft.use_grad_projection or craft.log_angle or craft.lambda_floor > 0


def gate(state: DualState, epsilon: float | Tensor, craft: CraftConfig) -> Tensor:
    """Whether a conflict is projected away; with several budgets, whether one of them is exceeded.

    At an active constraint the two gradients are exactly opposed, and a projection that is always on deletes what
    lambda has to balance; `violated` projects only while the budget is exceeded.
    """
    if not craft.use_grad_projection:
        return state.multiplier.new_zeros((), dtype=torch.bool)
    if craft.projection_gate == "always":
        return state.multiplier.new_ones((), dtype=torch.bool)
    return (state.mean_loss > epsilon).any()
