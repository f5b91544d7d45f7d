"""The budget as a function of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from craft_ray.config import CraftConfig
from craft_ray.method.dual import epsilon_at, epsilon_reached

DECAYING = ("linear", "cosine", "exponential")


def config(schedule: str, decay_steps: int = 0, **settings: float) -> CraftConfig:
    return CraftConfig(
        epsilon_schedule=schedule, epsilon_start=0.2, epsilon_end=0.05, epsilon_decay_steps=decay_steps, **settings
    )


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [
        ("linear", 0.2 - 0.15 / 4, 0.125),
        ("cosine", 0.05 + 0.15 * (1 + math.sqrt(0.5)) / 2, 0.125),
        ("exponential", 0.05 + 0.15 * math.exp(-1.25), 0.05 + 0.15 * math.exp(-2.5)),
    ],
)
def test_known_values(schedule: str, quarter: float, half: float) -> None:
    craft = config(schedule, decay_steps=40)
    assert epsilon_at(10, 1000, craft) == pytest.approx(quarter)
    assert epsilon_at(20, 1000, craft) == pytest.approx(half)


@pytest.mark.parametrize("schedule", DECAYING)
def test_starts_at_epsilon_start_and_stays_at_epsilon_end(schedule: str) -> None:
    craft = config(schedule, decay_steps=40)
    assert epsilon_at(0, 1000, craft) == 0.2
    assert [epsilon_at(step, 1000, craft) for step in (40, 41, 999)] == [0.05] * 3
    assert epsilon_at(39, 1000, craft) > 0.05


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("steps", [2, 3, 100])
def test_zero_decay_steps_are_the_whole_run(schedule: str, steps: int) -> None:
    """The last step has the budget of the certificate."""
    craft = config(schedule)
    assert epsilon_at(0, steps, craft) == 0.2
    assert epsilon_at(steps - 1, steps, craft) == 0.05
    assert epsilon_at(max(steps - 2, 0), steps, craft) > 0.05


@pytest.mark.parametrize("schedule", DECAYING)
def test_a_run_of_one_step_has_a_budget(schedule: str) -> None:
    assert epsilon_at(0, 1, config(schedule)) == 0.2


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("decay_steps", [0, 1, 37, 500])
def test_only_tightens(schedule: str, decay_steps: int) -> None:
    values = [epsilon_at(step, 100, config(schedule, decay_steps)) for step in range(100)]
    assert all(a >= b for a, b in pairwise(values))
    assert all(0.05 <= value <= 0.2 for value in values)


@pytest.mark.parametrize("decay_steps", [0, 10])
def test_constant_is_constant(decay_steps: int) -> None:
    craft = CraftConfig(epsilon_start=0.07, epsilon_decay_steps=decay_steps)
    assert {epsilon_at(step, 50, craft) for step in range(50)} == {0.07}


def test_an_unknown_schedule_is_an_error_that_names_the_known_ones() -> None:
    craft = config("linear").model_copy(update={"epsilon_schedule": "steep"})
    with pytest.raises(ValueError, match=r"steep.*constant, linear, cosine or exponential"):
        epsilon_at(1, 10, craft)


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("steps", [2, 18, 101, 10_000])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.8, 1.0])
def test_a_fraction_of_the_run_is_the_same_curve_for_every_length(schedule: str, steps: int, part: float) -> None:
    """And its end is reached, so a run is judged by a budget that it had."""
    craft, last = config(schedule, epsilon_decay=part), steps - 1
    assert epsilon_reached(steps, craft) == 0.05
    assert epsilon_at(0, steps, craft) == 0.2
    middle = round(part * last / 2)
    as_steps = config(schedule, decay_steps=1_000_000)
    same = epsilon_at(round(middle / (part * last) * 1_000_000), 10_000_000, as_steps)
    assert epsilon_at(middle, steps, craft) == pytest.approx(same, abs=1e-6)


@pytest.mark.parametrize("schedule", DECAYING)
def test_a_decay_that_outlasts_the_run_ends_above_epsilon_end(schedule: str) -> None:
    assert epsilon_reached(11, config(schedule, decay_steps=20)) == epsilon_at(10, 11, config(schedule, decay_steps=20))
    assert 0.05 < epsilon_reached(11, config(schedule, decay_steps=20)) < 0.2
    assert epsilon_reached(11, config(schedule, decay_steps=10)) == 0.05
