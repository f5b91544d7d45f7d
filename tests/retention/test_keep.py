"""The budget that follows a skill: known moves, and a skill whose dependence on L_ret is known."""

from __future__ import annotations

import pytest

from craft_ray.retention.keep import KeptShare


def share(keep: float = 0.9, epsilon: float = 0.05, untouched: float = 0.0) -> KeptShare:
    found = KeptShare(keep, epsilon)
    found.start(untouched)
    return found


@pytest.mark.parametrize(
    ("loss", "kept", "epsilon"),
    [
        (0.06, 0.85, 0.04),  # 0.15 is lost, 0.1 may be: two thirds
        (0.06, 0.92, 0.075),
        (0.06, 0.9, 0.06),  # on target: the budget is what is measured
        (0.06, 0.1, 0.03),  # at most halved
        (0.06, 1.0, 0.12),  # at most doubled
        (0.06, 1.3, 0.12),
    ],
)
def test_the_budget_moves_in_proportion_to_what_may_be_lost(loss: float, kept: float, epsilon: float) -> None:
    budget = share()
    budget.observe(loss, kept)
    assert budget.epsilon == pytest.approx(epsilon)


def test_the_teachers_own_uncertainty_is_no_loss_of_skill() -> None:
    """A loss of tokens starts at the teacher's own: only what exceeds it moves."""
    budget = share(untouched=0.6)
    budget.observe(0.8, 0.8)
    assert budget.epsilon == pytest.approx(0.6 + 0.2 * 0.5)


def test_a_student_that_has_not_moved_tells_nothing() -> None:
    budget = share(untouched=0.6)
    budget.observe(0.6, 0.99)
    assert budget.epsilon == 0.05


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("first", [0.001, 0.05, 1.0])
def test_finds_the_target_whatever_the_curve(power: float, first: float) -> None:
    """The skill loses L^power: what is assumed is a proportion, and each validation takes it anew."""
    budget = share(keep=0.9, epsilon=first)
    for _ in range(12):
        budget.observe(budget.epsilon, 1 - budget.epsilon**power)
    assert 1 - budget.epsilon**power == pytest.approx(0.9, abs=2e-3)


def test_its_state_is_read_back() -> None:
    budget = share()
    budget.observe(0.06, 0.85)
    other = KeptShare(0.9, 0.05)
    other.load_state_dict(budget.state_dict())
    other.observe(0.04, 0.88)
    budget.observe(0.04, 0.88)
    assert other.epsilon == budget.epsilon
