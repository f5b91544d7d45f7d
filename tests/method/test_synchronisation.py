"""A step never synchronises with the host, which reads none of its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from craft_ray.method.distance import hidden_loss
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import GradientPair
from craft_ray.method.pooling import Layout, Pooling
from craft_ray.method.step import craft_step
from tests.support.worlds import ONE, Batch, batch, craft_config, mlp

READING = ("_local_scalar_dense", "is_nonzero", "nonzero", "aten.equal", "masked_select", "unique")
LAYOUTS = [Layout(6, 5, (0, 1)), Layout(4, 3, (0,))]
POSITIONS = ("vision_mean", "text_last", "every_2")

SETTINGS: list[dict[str, Any]] = [
    {},
    {"projection_gate": "always", "conflict_threshold": 1.0},
    {"use_grad_projection": False, "violation": "absolute", "violation_clip": None, "lambda_kp": 0.1},
    {"projection_mode": "equal", "loss_type": "cosine"},
    {"projection_mode": "task_priority", "loss_type": "l1"},
]


class HostReads(TorchDispatchMode):
    """Counts operations whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in READING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class World:
    """A network with hidden states, on a device, ready to take steps."""

    def __init__(self, device: str, settings: dict[str, Any], optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        self.device = torch.device(device)
        self.module = mlp().to(self.device)
        self.config = craft_config(**settings)
        self.pair = GradientPair(self.module.named_parameters())
        self.optimizer = optimizer(self.pair.parameters)
        self.state = DualState.start(self.config, self.device)
        self.pooling = Pooling.plan(LAYOUTS, POSITIONS, 6).to(self.device)
        with torch.no_grad():
            self.teacher = self.pooling([self.anchors().x, nn.functional.gelu(self.anchors().x)])
        self.batches = [self.move(batch(1, 3)), self.move(batch(2, 5))]

    def move(self, data: Batch) -> Batch:
        return Batch(data.x.to(self.device), data.y.to(self.device))

    def anchors(self) -> Batch:
        x = batch(3, 12).x.view(2, 6, 5)
        return self.move(Batch(x, x))

    def task_loss(self, data: Batch) -> Tensor:
        return (self.module(data.x) - data.y).square().mean()

    def retention_loss(self, data: Batch) -> Tensor:
        hidden = nn.functional.linear(self.module[0](data.x), self.module[0].weight.T)
        return hidden_loss(self.pooling([hidden, nn.functional.gelu(hidden)]), self.teacher, self.config.loss_type)

    def step(self, anchors: Batch | None) -> None:
        self.state, _ = craft_step(
            self.task_loss, self.batches, self.retention_loss, None if anchors is None else [anchors], self.state, 0.1,
            craft=self.config, optimizer=self.optimizer, gradients=self.pair, workers=ONE, max_norm=1.0,
            noise_floor=1e-7,
        )  # fmt: skip


def fused(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def test_the_counter_counts() -> None:
    with HostReads() as reads:
        value = torch.ones(3).sum()
        value.item()
        bool(value > 1)
        torch.ones(3).nonzero()
    assert len(reads.seen) >= 3


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("retention", [True, False])
def test_the_host_reads_no_value(settings: dict[str, Any], retention: bool) -> None:
    world = World("cpu", settings, fused)
    anchors = world.anchors()
    with HostReads() as reads:
        for _ in range(2):
            world.step(anchors if retention else None)
    assert reads.seen == []


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_needs_no_values_at_all(settings: dict[str, Any]) -> None:
    """On tensors without contents, reading a value is an error."""
    with pytest.raises(RuntimeError):
        torch.ones(1, device="meta").item()
    world = World("meta", settings, lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    for anchors in (world.anchors(), None):
        world.step(anchors)
    assert world.state.multiplier.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_host_never_waits_for_a_gpu(settings: dict[str, Any]) -> None:
    world = World("cuda", settings, fused)
    anchors = world.anchors()
    world.step(anchors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for data in (anchors, None):
            world.step(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
