"""The multiplier: it rises while the budget is exceeded, falls while it is met, and stays within its bounds."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from craft_ray.config import CraftConfig
from craft_ray.method.dual import DualState
from tests.support.worlds import craft_config

EPSILON = 0.1


def config(**settings: object) -> CraftConfig:
    return craft_config(**{"violation_clip": None} | settings)


def follow(losses: Iterable[float], craft: CraftConfig, epsilon: float = EPSILON) -> list[float]:
    """lambda after each value of L_ret."""
    state, values = DualState.start(craft), []
    for loss in losses:
        state = state.observe(torch.tensor(loss), craft).ascend(epsilon, craft)
        values.append(state.multiplier.item())
    return values


@pytest.mark.parametrize("violation", ["relative", "absolute"])
@pytest.mark.parametrize("kp", [0.0, 0.3])
def test_rises_while_violated_and_falls_while_met(violation: str, kp: float) -> None:
    craft = config(initial_lambda=5.0, violation=violation, lambda_kp=kp)
    rising = follow([0.2] * 5, craft)
    assert all(a < b for a, b in zip([5.0, *rising], rising, strict=False))
    falling = follow([0.05] * 5, craft)
    assert all(a > b for a, b in zip([5.0, *falling], falling, strict=False))


def test_stays_still_at_the_budget() -> None:
    assert follow([EPSILON] * 5, config(initial_lambda=2.0)) == pytest.approx([2.0] * 5, abs=1e-6)


def test_relative_and_absolute_steps_by_hand() -> None:
    """L_ret is twice the budget 0.1: the relative violation is 1, the absolute one 0.1."""
    assert follow([0.2], config(initial_lambda=1.0)) == pytest.approx([1.5])
    assert follow([0.2], config(initial_lambda=1.0, violation="absolute")) == pytest.approx([1.05])


def test_the_relative_step_does_not_depend_on_the_unit_of_the_loss() -> None:
    losses = [0.3, 0.02, 0.15, 0.1]
    craft = config(initial_lambda=1.0)
    assert follow([1000 * x for x in losses], craft, 1000 * EPSILON) == pytest.approx(follow(losses, craft), rel=1e-6)


@pytest.mark.parametrize("kp", [0.0, 2.0])
def test_never_leaves_its_bounds(kp: float) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = (EPSILON * 4 * torch.rand(500, generator=generator) ** 2).tolist()
    values = follow(losses, config(lambda_max=2.0, lambda_kp=kp))
    assert min(values) == 0.0
    assert max(values) == 2.0


@pytest.mark.parametrize("kp", [0.0, 0.3])
def test_leaves_the_cap_at_once_when_the_violation_ends(kp: float) -> None:
    values = follow([1.0] * 200 + [0.05], config(lambda_max=3.0, lambda_kp=kp))
    assert values[-2] == 3.0
    assert values[-1] <= 3.0 - 0.5 * 0.5 + 1e-6


@pytest.mark.parametrize("kp", [0.0, 0.3])
def test_leaves_zero_at_once_when_a_violation_starts(kp: float) -> None:
    values = follow([0.01] * 200 + [0.2], config(lambda_kp=kp))
    assert values[-2] == 0.0
    assert values[-1] >= 0.5 - 1e-6


@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_a_bounded_violation_bounds_the_rate(clip: float) -> None:
    values = follow([100.0] * 4, config(initial_lambda=0.0, violation_clip=clip))
    assert values == pytest.approx([0.5 * clip * n for n in (1, 2, 3, 4)])


def test_an_infinite_loss_moves_a_bounded_multiplier_by_one_step() -> None:
    values = follow([float("inf")], config(initial_lambda=1.0, violation_clip=1.0))
    assert values == [1.5]


def test_without_a_bound_one_value_drives_it_to_its_cap() -> None:
    assert follow([100.0], config(initial_lambda=0.0)) == [100.0]


def test_the_running_mean_is_unbiased_from_the_first_value() -> None:
    craft = config(retention_ema=0.9)
    state = DualState.start(craft)
    assert state.mean_loss.isnan()
    losses = [0.4, 0.1, 0.3]
    expected = [0.4, (0.9 * 0.4 + 0.1) / 1.9, (0.81 * 0.4 + 0.9 * 0.1 + 0.3) / 2.71]
    for loss, mean in zip(losses, expected, strict=True):
        state = state.observe(torch.tensor(loss), craft)
        assert state.mean_loss.item() == pytest.approx(mean, rel=1e-6)


def test_without_a_running_mean_it_follows_the_last_value() -> None:
    craft = config(retention_ema=0.0)
    state = DualState.start(craft).observe(torch.tensor(9.0), craft).observe(torch.tensor(0.25), craft)
    assert state.mean_loss.item() == 0.25


def test_the_observed_state_keeps_its_multiplier() -> None:
    craft = config(initial_lambda=1.25)
    assert DualState.start(craft).observe(torch.tensor(3.0), craft).multiplier.item() == 1.25


def overshoot(kp: float) -> float:
    """How far L_ret falls below the budget where it follows lambda with a lag: L' = (2 - lambda) - L."""
    craft = config(initial_lambda=0.0, lambda_lr=0.05, lambda_kp=kp, lambda_max=10.0)
    state, loss, lowest = DualState.start(craft), 2.0, 2.0
    for _ in range(1000):
        state = state.observe(torch.tensor(loss), craft).ascend(1.0, craft)
        loss += 0.05 * (2.0 - state.multiplier.item() - loss)
        lowest = min(lowest, loss)
    assert loss == pytest.approx(1.0, abs=1e-3)
    return 1.0 - lowest


def test_the_proportional_part_halves_the_overshoot() -> None:
    assert overshoot(0.0) > 0.1
    assert overshoot(1.0) < 0.5 * overshoot(0.0)


def test_a_saved_state_resumes_as_if_nothing_had_happened() -> None:
    craft = config(retention_ema=0.9, lambda_kp=0.3)
    state = DualState.start(craft)
    for loss in (0.3, 0.05, 0.2):
        state = state.observe(torch.tensor(loss), craft).ascend(EPSILON, craft)
    restored = DualState.from_state_dict(state.state_dict(), "cpu")
    for loss in (0.07, 0.4):
        state = state.observe(torch.tensor(loss), craft).ascend(EPSILON, craft)
        restored = restored.observe(torch.tensor(loss), craft).ascend(EPSILON, craft)
    for name, value in state.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)
