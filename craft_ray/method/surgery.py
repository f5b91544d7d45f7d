"""Gradient surgery: one-sided projection and the merge, as two coefficients.

    if cos < tau and the gate is open:   g_t <- g_t - (<g_t, g_r> / |g_r|^2) g_r       PCGrad, one-sided
                                                                                       (Yu et al., arXiv 2001.06782)
    g = a g_t + b g_r                    weighted a=1, b=lambda | equal a=b=1/2 | task_priority a=1, b=min(lambda, 1)

Both steps and the clipping are linear, so they collapse to g = a g_t + c g_r with c = b - a <g_t, g_r>/|g_r|^2, and
|g|^2 = a^2 |g_t|^2 + 2 a c <g_t, g_r> + c^2 |g_r|^2 needs no further pass over the gradients.
Everything is a scalar on the device; the host does not wait for it.
"""

from __future__ import annotations

from torch import Tensor, where

from craft_ray.method.gradients import Gram


def projection(gram: Gram, conflict: Tensor) -> Tensor:
    """How much of g_r to take from g_t: <g_t, g_r>/|g_r|^2 where the gradients conflict, else 0."""
    return where(conflict, gram.dot / gram.retention_sq, 0.0)


def floored(multiplier: Tensor, gram: Gram, floor: float) -> Tensor:
    """max(lambda, floor |g_t|/|g_r|): what g_r is weighted with, so that it never counts less than `floor` of g_t.

    With a floor below 1, g = g_t + w g_r vanishes only where g_t = -lambda g_r, because at the floor |w g_r| < |g_t|.
    So the solutions are those of the constrained problem, and <g, g_t> > 0 wherever the floor decides: the task's loss
    keeps falling. (With K > 1 this holds for the K steps together, of which one has K g_r.) Without a floor, lambda
    falls to 0 while the budget is met, and what could be kept for nothing is lost.
    """
    if floor == 0:
        return multiplier
    least = floor * (gram.task_sq / gram.retention_sq).sqrt()
    return where(gram.retention_sq > 0, multiplier.maximum(least), multiplier)


def merge(mode: str, multiplier: Tensor) -> tuple[float, Tensor]:
    """The coefficients (a, b) of g = a g_t + b g_r."""
    if mode == "weighted":
        return 1.0, multiplier
    if mode == "equal":
        return 0.5, multiplier.new_full((), 0.5)
    if mode == "task_priority":
        return 1.0, multiplier.clamp(max=1.0)
    raise ValueError(f"unknown projection_mode '{mode}': weighted, equal or task_priority")


def merged_norm(gram: Gram, task: Tensor | float, retention: Tensor) -> Tensor:
    """|task * g_t + retention * g_r|, from the three numbers of the Gram matrix."""
    square = task**2 * gram.task_sq + 2 * task * retention * gram.dot + retention**2 * gram.retention_sq
    return square.clamp(min=0.0).sqrt()


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor | float:
    """The factor that brings a gradient of this norm down to `max_norm`, with torch's own clipping formula."""
    if max_norm is None:
        return 1.0
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
