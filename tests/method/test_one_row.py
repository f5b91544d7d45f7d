"""Less memory for the second gradient: none at all where nothing compares the two, or half of it in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_ray.method.dual import DualState
from craft_ray.method.gradients import RETENTION, TASK, GradientPair
from craft_ray.method.step import StepMetrics, compares_gradients, craft_step
from tests.support.worlds import ONE, Batch, batch, craft_config, mlp, squared_error


class Parts:
    """Samples of two losses by turns."""

    counts_S = torch.tensor([4.0, 4.0])

    def __init__(self, samples: Batch) -> None:
        self.samples = samples


def two_losses(module: nn.Module) -> Any:
    def sums(parts: Parts) -> Tensor:
        error_B = (module(parts.samples.x) - parts.samples.y).square().mean(1)
        return torch.stack([error_B[::2].sum(), error_B[1::2].sum()])

    return sums


def several_steps(settings: dict[str, Any], short: bool = False) -> tuple[Tensor, list[StepMetrics], GradientPair]:
    """Three steps with two constraints, of which one is over its budget."""
    module, craft = mlp(), craft_config(**settings)
    pair = GradientPair(module.named_parameters(), with_retention=compares_gradients(craft), short_retention=short)
    optimizer = torch.optim.SGD(pair.parameters, lr=0.1)
    state, found = DualState.together([DualState.start(craft)] * 2), []
    for seed in range(3):
        state, metrics = craft_step(
            squared_error(module), batch(seed).split(5, 3), two_losses(module), [Parts(batch(seed + 9))], state,
            torch.tensor([0.01, 100.0], dtype=torch.float64),
            craft=craft, optimizer=optimizer, gradients=pair, workers=ONE, max_norm=1.0,
        )  # fmt: skip
        found.append(metrics)
    return nn.utils.parameters_to_vector(module.parameters()).detach(), found, pair


PLAIN = {"use_grad_projection": False, "lambda_floor": 0.0, "retention_freq": 3}


@pytest.mark.parametrize("mode", ["weighted", "equal", "task_priority"])
def test_several_constraints_share_one_row_where_nothing_compares(mode: str) -> None:
    """The same weights and the same multipliers as with two rows."""
    one, in_one, pair = several_steps({**PLAIN, "log_angle": False, "projection_mode": mode})
    two, in_two, other = several_steps({**PLAIN, "log_angle": True, "projection_mode": mode})
    assert [len(buffer) for buffer in (*pair.buffers, *other.buffers)] == [1, 2]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(in_one, in_two, strict=True):
        assert mine.skills_2S is not None
        torch.testing.assert_close(mine.skills_2S, theirs.skills_2S, rtol=1e-5, atol=1e-6)
        for name in ("task_loss", "retention_loss", "multiplier", "weight", "grad_norm"):
            torch.testing.assert_close(
                getattr(mine, name), getattr(theirs, name), rtol=1e-5, atol=1e-6, check_dtype=False
            )
        assert mine.cos.isnan()


def test_a_short_row_is_the_gradient_rounded_once() -> None:
    module = mlp()
    exact = GradientPair(module.named_parameters())
    short = GradientPair(module.named_parameters(), short_retention=True)
    for pair in (exact, short):
        order: Sequence[int] = (RETENTION, TASK)
        for row in order:
            pair.backward(row, squared_error(module), batch(row).split(3, 5), ONE)
    [both], [task], [rounded] = exact.buffers, short.buffers, short.short
    assert torch.equal(task[0], both[TASK])
    assert torch.equal(rounded, both[RETENTION].bfloat16())
    held = sum(t.nbytes for t in (task, rounded))
    assert held * 4 == both.nbytes * 3
    torch.testing.assert_close(short.gram().cos, exact.gram().cos, rtol=0, atol=4e-3)


def test_steps_with_a_short_row_are_those_of_two_within_its_rounding() -> None:
    settings = {"conflict_threshold": 0.9, "projection_gate": "always"}
    rounded, in_rounded, pair = several_steps(settings, short=True)
    exact, in_exact, _ = several_steps(settings)
    assert pair.retention_first
    assert [bool(m.projected) for m in in_rounded] == [bool(m.projected) for m in in_exact]
    assert any(m.projected for m in in_exact)
    moved = (exact - nn.utils.parameters_to_vector(mlp().parameters()).detach()).norm()
    assert 0 < (rounded - exact).norm() < 4e-3 * moved
