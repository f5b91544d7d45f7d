"""The retention step of the product, and the ways that it is compared with. Needs only torch, even on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.harness import Variant
from benchmarks.workload import RetentionTask
from craft_ray.method import surgery
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import RETENTION, TASK, GradientPair
from craft_ray.method.step import Loss, compares_gradients, craft_step, gate, task_step
from craft_ray.workers import OneWorker

EPSILON, MAX_NORM, MULTIPLIER = 0.03, 1.0, 0.7

SETTINGS: Any = SimpleNamespace(
    enabled=True,
    retention_freq=1,
    conflict_measure="cosine",
    conflict_threshold=-0.1,
    use_grad_projection=True,
    projection_gate="violated",
    log_angle=True,
    projection_mode="weighted",
    initial_lambda=1.0,
    lambda_start=1.0,
    lambda_lr=0.1,
    lambda_max=10.0,
    lambda_kp=0.0,
    lambda_floor=0.35,
    violation="relative",
    violation_clip=1.0,
    retention_ema=0.9,
)
"""The settings of `CraftConfig` that a step reads, for machines without pydantic."""


def optimizer_of(parameters: list[torch.nn.Parameter]) -> AdamW:
    return AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)


class Ours:
    """The product's step with its state."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        task_loss: Loss,
        retention_loss: Loss,
        task: Any,
        anchors: Any,
        optimizer: AdamW | None = None,
        settings: Any = SETTINGS,
    ) -> None:
        named = list(parameters)
        self.settings = settings
        self.gradients = GradientPair(named, with_retention=compares_gradients(settings))
        self.optimizer = optimizer or optimizer_of(self.gradients.parameters)
        self.device = named[0][1].device
        self.state = DualState.start(SETTINGS, self.device)
        self.losses, self.batches = (task_loss, retention_loss), (task, anchors)

    def step(self) -> None:
        self.state, _ = craft_step(
            self.losses[0],
            [self.batches[0]],
            self.losses[1],
            [self.batches[1]],
            self.state,
            EPSILON,
            craft=self.settings,
            optimizer=self.optimizer,
            gradients=self.gradients,
            workers=OneWorker(self.device),
            max_norm=MAX_NORM,
        )

    def task_step(self) -> None:
        """A step without retention."""
        task_step(
            self.losses[0],
            [self.batches[0]],
            optimizer=self.optimizer,
            gradients=self.gradients,
            workers=OneWorker(self.device),
            max_norm=MAX_NORM,
        )

    def fill(self) -> None:
        for row in (TASK, RETENTION):
            self.gradients.backward(row, self.losses[row], [self.batches[row]], OneWorker(self.device))


def ours(task: RetentionTask, optimizer: AdamW | None = None, settings: Any = SETTINGS) -> Ours:
    parameters = task.model.named_parameters()
    return Ours(parameters, task.task_loss, task.retention_loss, task.task, task.anchors, optimizer, settings)


def operate(gradients: GradientPair, state: DualState, settings: Any = SETTINGS) -> None:
    """What `craft_step` does between the backward passes and the optimiser."""
    gram = gradients.gram()
    conflict = gram.cos < settings.conflict_threshold
    removed = surgery.projection(gram, conflict & gate(state, EPSILON, settings))
    a, b = surgery.merge(settings.projection_mode, surgery.floored(state.multiplier, gram, settings.lambda_floor))
    c = settings.retention_freq * b - a * removed
    scale = surgery.clip_factor(surgery.merged_norm(gram, a, c), MAX_NORM)
    gradients.combine(scale * a, scale * c)


def read_and_axpy(gradients: GradientPair) -> None:
    """One read of both gradients and one axpy: the minimum of any surgery."""
    for task, retention in gradients.buffers:
        torch.dot(task, retention)
        task.add_(retention, alpha=1e-3)


def naive_surgery(task: list[Tensor], retention: list[Tensor]) -> list[Tensor]:
    """Lists of gradients, one dot product per parameter, sums on the host."""
    dot = sum((t * r).sum().item() for t, r in zip(task, retention, strict=True))
    task_sq = sum((t**2).sum().item() for t in task)
    retention_sq = sum((r**2).sum().item() for r in retention)
    if dot / (task_sq**0.5 * retention_sq**0.5 + 1e-12) < SETTINGS.conflict_threshold:
        task = [t - dot / (retention_sq + 1e-12) * r for t, r in zip(task, retention, strict=True)]
    return [t + MULTIPLIER * r for t, r in zip(task, retention, strict=True)]


class Plainly:
    """The ways that need no buffers, on one model with one optimiser."""

    def __init__(self, task: RetentionTask) -> None:
        self.task = task
        self.parameters = task.parameters
        self.optimizer = optimizer_of(self.parameters)

    def _backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def task_pass(self) -> None:
        self._backward(self.task.task_loss(self.task.task))

    def retention_pass(self) -> None:
        self._backward(self.task.retention_loss(self.task.anchors))

    def update(self) -> None:
        self.optimizer.step()

    def task_step(self) -> None:
        self.task_pass()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.update()

    def summed(self) -> None:
        self._backward(self.task.task_loss(self.task.task) + MULTIPLIER * self.task.retention_loss(self.task.anchors))
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.update()

    def naive(self) -> None:
        self.task_pass()
        task = [p.grad.clone() for p in self.parameters]  # type: ignore[union-attr]
        self.retention_pass()
        retention = [p.grad.clone() for p in self.parameters]  # type: ignore[union-attr]
        for p, merged in zip(self.parameters, naive_surgery(task, retention), strict=True):
            p.grad = merged
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM).item()
        self.update()

    def torchjd(self) -> None:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        self.optimizer.zero_grad(set_to_none=True)
        losses = [self.task.task_loss(self.task.task), self.task.retention_loss(self.task.anchors)]
        backward(losses, inputs=self.parameters, parallel_chunk_size=1)
        jac_to_grad(self.parameters, PCGrad())
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.update()


def has_torchjd() -> bool:
    try:
        import torchjd  # noqa: F401
    except ImportError:
        return False
    return True


PARTS = ("task pass", "retention pass", "optimiser step")
"""The parts of a retention step; their sum is the unit of the table."""


def step_variants(plain: RetentionTask, own: RetentionTask) -> dict[str, Variant]:
    """All steps to compare. `own` is a second model: the product's hooks and buffers must not touch the others."""
    others = Plainly(plain)
    product = ours(own)
    steps: dict[str, Callable[[], None]] = {
        "craft_step": product.step,
        "plain task step": others.task_step,
        "summed loss, no surgery": others.summed,
        "lists and .item()": others.naive,
    }
    if has_torchjd():
        steps["TorchJD PCGrad"] = others.torchjd
    parts = {
        PARTS[0]: Variant(others.task_pass),
        PARTS[1]: Variant(others.retention_pass),
        PARTS[2]: Variant(others.update, prepare=others.task_pass),
    }
    return parts | {name: Variant(step) for name, step in steps.items()}
