"""Several constraints under one backward pass: the gradient, the solution, and what micro-batches must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from craft_ray.method.dual import DualState
from craft_ray.method.gradients import RETENTION, GradientPair
from craft_ray.method.step import craft_step, part_of_sum
from tests.support.worlds import ONE, Batch, Terms, batch, craft_config, mlp, named

F64 = torch.float64


@dataclass(frozen=True)
class Parts:
    """Samples of several losses."""

    samples: Batch
    part_B: Tensor
    number: int

    @property
    def counts_S(self) -> Tensor:
        return self.part_B.bincount(minlength=self.number).double()


def sums_of(module: Callable[[Tensor], Tensor]) -> Callable[[Parts], Tensor]:
    """The sum of squared errors of each loss's samples."""

    def sums(parts: Parts) -> Tensor:
        losses_B = (module(parts.samples.x) - parts.samples.y).square().mean(1)
        return losses_B.new_zeros(parts.number).index_add(0, parts.part_B, losses_B)

    return sums


WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
PART_B = torch.tensor([0, 1, 1, 2, 2, 2, 0, 2])


def pieces(sizes: tuple[int, ...]) -> list[Parts]:
    together = zip(batch(3).split(*sizes), PART_B.split(sizes), strict=True)
    return [Parts(samples, part_B, 3) for samples, part_B in together]


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 5, 2)])
def test_one_backward_pass_has_the_gradient_of_the_weighted_sum(sizes: tuple[int, ...]) -> None:
    """Each loss is the mean over its own samples, however these are dealt out over micro-batches."""
    module = mlp()
    pair = GradientPair(module.named_parameters())
    losses = pair.backward_parts(RETENTION, sums_of(module), pieces(sizes), WEIGHTS, ONE)
    found = [view.clone() for view in pair.views[RETENTION]]
    pair.close()
    whole = batch(3)
    error_B = (module(whole.x) - whole.y).square().mean(1)
    means = torch.stack([error_B[part == PART_B].mean() for part in range(3)])
    torch.testing.assert_close(losses, means.detach(), rtol=1e-5, atol=1e-6)
    (WEIGHTS.float() * means).sum().backward()
    for view, parameter in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(view, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_loss_without_a_sample_in_a_batch_is_zero() -> None:
    module = mlp()
    pair = GradientPair(module.named_parameters())
    none_of_the_third = replace(pieces((8,))[0], part_B=PART_B.clamp(max=1))
    losses = pair.backward_parts(RETENTION, sums_of(module), [none_of_the_third], WEIGHTS, ONE)
    assert losses[2] == 0
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(view).all() for view in pair.views[RETENTION])


def test_parts_of_the_sum_are_equal_while_every_multiplier_is_zero() -> None:
    torch.testing.assert_close(part_of_sum(torch.zeros(4, dtype=F64)), torch.full((4,), 0.25, dtype=F64))
    torch.testing.assert_close(part_of_sum(torch.tensor([3.0, 1.0])), torch.tensor([0.75, 0.25]))


CURVATURE = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=F64)
OPTIMUM = torch.tensor([1.0, 1.0, -1.0, 0.5], dtype=F64)
CONSTRAINTS = torch.tensor([[2.0, 0.5, 0.0, 0.0], [0.0, 1.0, 1.0, 0.2], [0.01, 0.0, 0.03, 0.0]], dtype=F64)
"""d of each constraint sum d theta^2 / 2: they overlap, and the third is a hundred times smaller."""
LAMBDAS = torch.tensor([1.5, 0.6, 20.0], dtype=F64)


def losses_at(theta: Tensor) -> Tensor:
    return (CONSTRAINTS * theta.square()).sum(1) / 2


def solution() -> tuple[Tensor, Tensor]:
    """theta* for these multipliers, and the budgets for which both are the solution: the problem is convex, so a point
    that meets the conditions of Karush, Kuhn and Tucker is it."""
    theta = CURVATURE * OPTIMUM / (CURVATURE + LAMBDAS @ CONSTRAINTS)
    return theta, losses_at(theta)


@pytest.mark.parametrize(
    ("optimizer", "rate", "dual_rate", "steps"),
    [(torch.optim.SGD, 0.05, 0.2, 1500), (torch.optim.AdamW, 0.01, 0.05, 4500)],
    ids=["sgd", "adamw"],
)
def test_three_constraints_reach_theta_and_all_three_multipliers(
    optimizer: type, rate: float, dual_rate: float, steps: int
) -> None:
    theta_star, budgets = solution()
    theta = nn.Parameter(torch.zeros(4, dtype=F64))
    craft = craft_config(lambda_lr=dual_rate, use_grad_projection=False)
    chosen = optimizer([theta], lr=rate, weight_decay=0.0)
    gradients, state = GradientPair(named([theta])), DualState.together([DualState.start(craft)] * 3)

    @dataclass(frozen=True)
    class One:
        counts_S = torch.ones(3, dtype=F64)

    for _ in range(steps):
        state, metrics = craft_step(
            lambda _: (CURVATURE * (theta - OPTIMUM).square()).sum() / 2,
            [Terms()],
            lambda _: losses_at(theta),
            [One()],
            state,
            budgets,
            craft=craft,
            optimizer=chosen,
            gradients=gradients,
            workers=ONE,
            max_norm=None,
        )
    torch.testing.assert_close(theta.detach(), theta_star, rtol=0, atol=2e-3)
    torch.testing.assert_close(state.multiplier, LAMBDAS, rtol=3e-2, atol=0)
    assert metrics.skills_2S is not None
    torch.testing.assert_close(metrics.skills_2S[0], budgets, rtol=3e-2, atol=0)
    assert metrics.multiplier == pytest.approx(state.multiplier.sum().item())


def test_states_are_joined_and_taken_apart() -> None:
    craft = craft_config()
    states = [DualState.start(craft).observe(torch.tensor(value), craft) for value in (0.1, 0.7)]
    assert [vars(state) for state in DualState.together(states).apart()] == [vars(state) for state in states]
    following = DualState.together(states).ascend(torch.tensor([0.05, 1.0], dtype=F64), craft)
    alone = [state.ascend(epsilon, craft) for state, epsilon in zip(states, (0.05, 1.0), strict=True)]
    assert [state.multiplier for state in following.apart()] == [state.multiplier for state in alone]


def vector(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def test_one_of_several_is_the_step_of_a_single_constraint() -> None:
    craft, epsilon = craft_config(conflict_threshold=0.9), 0.05
    alone, together = mlp(), mlp()
    for module, several in ((alone, False), (together, True)):
        pair, state = GradientPair(module.named_parameters()), DualState.start(craft)
        anchors = batch(5)
        loss = sums_of(module) if several else (lambda b, m=module: (m(b.x) - b.y).square().mean())
        craft_step(
            lambda b, m=module: (m(b.x) - b.y).square().mean(),
            [batch(4)],
            loss,
            [Parts(anchors, torch.zeros(8, dtype=torch.int64), 1) if several else anchors],
            DualState.together([state]) if several else state,
            torch.tensor([epsilon], dtype=F64) if several else epsilon,
            craft=craft,
            optimizer=torch.optim.AdamW(pair.parameters, lr=1e-2),
            gradients=pair,
            workers=ONE,
            max_norm=0.5,
        )
    torch.testing.assert_close(vector(together), vector(alone), rtol=1e-5, atol=1e-7)
