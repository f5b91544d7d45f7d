"""Dot, cosine and norms of two long gradients, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from craft_ray.method.gradients import BLOCK, RETENTION, TASK, GradientPair, Gram
from tests.support.worlds import ONE, Terms, linear_loss, named


def compare(task: Tensor, retention: Tensor, parts: tuple[int, ...]) -> Gram:
    parameters = [nn.Parameter(torch.zeros(n, dtype=task.dtype)) for n in parts]
    pair = GradientPair(named(parameters))
    for row, gradient in ((TASK, task), (RETENTION, retention)):
        pair.backward(row, linear_loss(parameters, gradient.split(parts)), [Terms()], ONE)
    return pair.gram()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [(1,), (BLOCK,), (BLOCK + 1,), (3, 5 * BLOCK, 7)])
def test_equals_float64_whatever_the_lengths(parts: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    task, retention = torch.randn(2, sum(parts)).to(dtype)
    gram, t, r = compare(task, retention, parts), task.double(), retention.double()
    scale = (t.norm() * r.norm()).item()
    assert gram.dot.item() == pytest.approx((t @ r).item(), abs=1e-6 * scale)
    assert gram.task_sq.item() == pytest.approx((t @ t).item(), rel=1e-6)
    assert gram.retention_sq.item() == pytest.approx((r @ r).item(), rel=1e-6)
    assert gram.cos.item() == pytest.approx((t @ r).item() / scale, abs=1e-6)


def test_a_long_sum_keeps_its_small_terms() -> None:
    """A float32 accumulator at 2^24 no longer sees a term of 1; four million of them are a fifth of the sum."""
    task = torch.ones(1 << 22)
    task[0] = 4096.0
    retention = torch.ones(1 << 22)
    retention[0] = -4096.0
    exact_dot, exact_sq = (1 << 22) - 1 - 2**24, (1 << 22) - 1 + 2**24
    naive = np.add.accumulate((task * task).numpy(), dtype=np.float32)[-1]
    assert abs(naive / exact_sq - 1) > 0.1
    gram = compare(task, retention, (1 << 20, 3 << 20))
    assert gram.dot.item() == pytest.approx(exact_dot, rel=1e-4)
    assert gram.task_sq.item() == pytest.approx(exact_sq, rel=1e-4)
    assert gram.cos.item() == pytest.approx(exact_dot / exact_sq, abs=1e-4)


def test_the_cosine_of_a_gradient_with_itself_is_one() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(1_000_000)
    assert compare(gradient, 3e-4 * gradient, (1_000_000,)).cos.item() == pytest.approx(1.0, abs=1e-6)
    assert compare(gradient, -3e4 * gradient, (1_000_000,)).cos.item() == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_tiny_and_huge_gradients_have_a_cosine(scale: float) -> None:
    task, retention = torch.tensor([3.0, 4.0]) * scale, torch.tensor([4.0, 3.0]) * scale
    assert compare(task, retention, (2,)).cos.item() == pytest.approx(0.96, abs=1e-6)
