"""Projection, merge and clipping on gradients that are written down by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchjd.aggregation import PCGrad

from tests.support.worlds import Outcome, step_on

MODES = ("weighted", "equal", "task_priority")

OPPOSED = torch.tensor([3.0, -4.0]), torch.tensor([0.0, 2.0])  # cosine -0.8, dot -8
AGREEING = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])  # cosine 0.8, dot 8


def step(pair: tuple[Tensor, Tensor], **settings: object) -> Outcome:
    return step_on([pair[0]], [pair[1]], **settings)


def random_pair(seed: int, size: int = 40, lean: float = -0.3) -> tuple[Tensor, Tensor]:
    """Gradients whose cosine is about `lean`, give or take 0.15."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, size, generator=generator)
    return a, lean * a + math.sqrt(1 - lean**2) * b


# -- the floor under lambda


def test_the_floor_is_in_units_of_the_two_norms() -> None:
    """|g_t| = 5, |g_r| = 2: a floor of 0.4 is a weight of 1."""
    for multiplier, weight in ((0.0, 1.0), (0.5, 1.0), (3.0, 3.0)):
        out = step(AGREEING, multiplier=multiplier, lambda_floor=0.4, lambda_lr=0.0)
        assert out.metrics.weight.item() == pytest.approx(weight)
        assert out.metrics.multiplier.item() == multiplier
        torch.testing.assert_close(out.flat, torch.tensor([3.0, 4.0 + 2.0 * weight]))


@pytest.mark.parametrize("floor", [0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_at_the_floor_every_step_still_descends_on_the_task(seed: int, floor: float) -> None:
    task, retention = random_pair(seed, lean=-0.95)
    out = step((task, retention), multiplier=0.0, lambda_floor=floor, use_grad_projection=False)
    assert torch.dot(out.flat, task) > 0


def test_rounding_of_the_cache_gets_no_floor() -> None:
    """The gradient of a loss within the noise has no direction that could be kept."""
    out = step(AGREEING, multiplier=0.0, lambda_floor=0.9, noise_floor=10.0)
    torch.testing.assert_close(out.flat, AGREEING[0])


# -- projection


@pytest.mark.parametrize("seed", range(10))
def test_a_projected_task_gradient_no_longer_opposes_retention(seed: int) -> None:
    task, retention = random_pair(seed, lean=-0.6)
    out = step((task, retention), multiplier=0.0)
    assert out.metrics.conflict.item() is True
    assert abs(torch.dot(out.flat, retention)) < 1e-6 * task.norm() * retention.norm()


@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_the_nearest_gradient_that_does_not_conflict(seed: int) -> None:
    """What is removed is parallel to g_r and orthogonal to what is left."""
    task, retention = random_pair(seed, lean=-0.6)
    left = step((task, retention), multiplier=0.0).flat
    removed = task - left
    assert abs(torch.dot(removed, left)) < 1e-5 * task.norm() ** 2
    torch.testing.assert_close(removed / removed.norm(), -retention / retention.norm())


def test_projection_by_hand() -> None:
    out = step(OPPOSED, multiplier=0.0)
    torch.testing.assert_close(out.flat, torch.tensor([3.0, 0.0]))


@pytest.mark.parametrize("mode", MODES)
def test_no_conflict_means_unchanged(mode: str) -> None:
    projecting = step(AGREEING, multiplier=0.5, projection_mode=mode)
    plain = step(AGREEING, multiplier=0.5, projection_mode=mode, use_grad_projection=False)
    assert projecting.metrics.conflict.item() is False
    assert torch.equal(projecting.flat, plain.flat)


def test_switched_off_nothing_is_projected_and_the_conflict_is_still_seen() -> None:
    out = step(OPPOSED, multiplier=0.0, use_grad_projection=False)
    assert torch.equal(out.flat, OPPOSED[0])
    assert out.metrics.conflict.item() is True


# -- what is compared with the threshold


def test_a_large_negative_dot_product_of_nearly_orthogonal_gradients_is_no_conflict() -> None:
    """The dot product -100 is far below the threshold -0.1, the cosine -0.0995 is not."""
    task, retention = torch.tensor([-10.0, 100.0]), torch.tensor([10.0, 0.0])
    out = step((task, retention), conflict_threshold=-0.1)
    assert out.metrics.dot.item() == pytest.approx(-100.0)
    assert out.metrics.cos.item() == pytest.approx(-10 / math.sqrt(10100))
    assert out.metrics.conflict.item() is False
    assert torch.equal(out.flat, task)


def test_a_tiny_negative_dot_product_of_opposed_gradients_is_a_conflict() -> None:
    """The dot product -1e-6 is above the threshold -0.1, the cosine -1 is far below it."""
    task, retention = torch.tensor([-1e-3, 0.0]), torch.tensor([1e-3, 0.0])
    out = step((task, retention), conflict_threshold=-0.1)
    assert out.metrics.dot.item() == pytest.approx(-1e-6)
    assert out.metrics.cos.item() == pytest.approx(-1.0)
    assert out.metrics.conflict.item() is True
    assert out.flat.abs().max() < 1e-9


def test_the_dot_product_is_compared_by_choice() -> None:
    """-100 and -1e-6 beside the threshold -0.1: each the other way round than its cosine."""
    far = step((torch.tensor([-10.0, 100.0]), torch.tensor([10.0, 0.0])), conflict_measure="dot")
    assert far.metrics.conflict.item() is True
    torch.testing.assert_close(far.flat, torch.tensor([0.0, 100.0]))
    near = step((torch.tensor([-1e-3, 0.0]), torch.tensor([1e-3, 0.0])), conflict_measure="dot")
    assert near.metrics.conflict.item() is False


def test_dot_and_cosine_are_logged_by_their_own_names_before_surgery() -> None:
    metrics = step(OPPOSED, multiplier=0.0).metrics
    assert metrics.dot.item() == pytest.approx(-8.0)
    assert metrics.cos.item() == pytest.approx(-0.8)


@pytest.mark.parametrize(("threshold", "conflict"), [(-0.81, False), (-0.79, True), (1.0, True), (-1.0, False)])
def test_the_threshold_is_a_cosine(threshold: float, conflict: bool) -> None:
    assert step(OPPOSED, conflict_threshold=threshold).metrics.conflict.item() is conflict


# -- no direction, no conflict


@pytest.mark.parametrize("zero", ["task", "retention"])
def test_a_zero_gradient_has_no_cosine_and_no_conflict(zero: str) -> None:
    task, retention = OPPOSED
    pair = (torch.zeros(2), retention) if zero == "task" else (task, torch.zeros(2))
    out = step(pair, multiplier=2.0, conflict_threshold=1.0)
    assert math.isnan(out.metrics.cos.item())
    assert out.metrics.conflict.item() is False
    torch.testing.assert_close(out.flat, pair[0] + 2.0 * pair[1])


@pytest.mark.parametrize(("loss", "seen"), [(0.9e-7, False), (1e-7, False), (1.1e-7, True)])
def test_up_to_the_noise_floor_a_gradient_has_no_direction(loss: float, seen: bool) -> None:
    """Step 0: the student is the teacher, and what is left of L_ret is the cache's rounding."""
    out = step(OPPOSED, retention_loss=loss, epsilon=1e-9, noise_floor=1e-7, multiplier=0.0)
    assert out.metrics.conflict.item() is seen
    assert math.isnan(out.metrics.cos.item()) is not seen
    torch.testing.assert_close(out.flat, torch.tensor([3.0, 0.0]) if seen else OPPOSED[0])


# -- the gate


@pytest.mark.parametrize(("loss", "projected"), [(0.49, False), (0.5, False), (0.51, True)])
def test_the_gate_violated_opens_above_the_budget(loss: float, projected: bool) -> None:
    out = step(OPPOSED, retention_loss=loss, epsilon=0.5, projection_gate="violated")
    torch.testing.assert_close(out.flat, torch.tensor([3.0, 0.0]) if projected else OPPOSED[0])
    assert out.metrics.conflict.item() is True


def test_the_gate_always_projects_under_the_budget_too() -> None:
    out = step(OPPOSED, retention_loss=0.01, epsilon=0.5, projection_gate="always")
    torch.testing.assert_close(out.flat, torch.tensor([3.0, 0.0]))


# -- merge and clip


@pytest.mark.parametrize(
    ("mode", "multiplier", "expected", "weight"),
    [
        ("weighted", 0.5, [3.0, 5.0], 0.5),
        ("weighted", 3.0, [3.0, 10.0], 3.0),
        ("equal", 0.5, [1.5, 3.0], 0.5),
        ("equal", 3.0, [1.5, 3.0], 0.5),
        ("task_priority", 0.5, [3.0, 5.0], 0.5),
        ("task_priority", 3.0, [3.0, 6.0], 1.0),
    ],
)
def test_merges_by_hand(mode: str, multiplier: float, expected: list[float], weight: float) -> None:
    out = step(AGREEING, multiplier=multiplier, projection_mode=mode)
    torch.testing.assert_close(out.flat, torch.tensor(expected))
    assert out.metrics.grad_norm.item() == pytest.approx(math.hypot(*expected), rel=1e-6)
    assert out.metrics.weight.item() == weight


def test_a_retention_gradient_that_comes_every_kth_step_counts_k_times_and_the_projection_once() -> None:
    agreeing = step(AGREEING, multiplier=0.5, retention_freq=3)
    torch.testing.assert_close(agreeing.flat, torch.tensor([3.0, 4.0 + 3 * 0.5 * 2.0]))
    opposed = step(OPPOSED, multiplier=0.5, retention_freq=3)
    torch.testing.assert_close(opposed.flat, torch.tensor([3.0, 3 * 0.5 * 2.0]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_the_norm_from_the_gram_matrix_is_the_norm_of_the_gradient(mode: str, seed: int) -> None:
    out = step(random_pair(seed, 5000), multiplier=0.7, projection_mode=mode, conflict_threshold=0.0)
    assert out.metrics.grad_norm.item() == pytest.approx(out.flat.double().norm().item(), rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 50.0])
def test_clipping_is_torchs(max_norm: float) -> None:
    pair = random_pair(1, 3000)
    free, clipped = step(pair, multiplier=2.0), step(pair, multiplier=2.0, max_norm=max_norm)
    reference = torch.nn.Parameter(torch.zeros(3000))
    reference.grad = free.flat.clone()
    norm = torch.nn.utils.clip_grad_norm_([reference], max_norm)
    torch.testing.assert_close(clipped.flat, reference.grad, rtol=1e-5, atol=1e-8)
    assert clipped.metrics.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)


# -- against implementations that are written out


def reference_step(
    task: Sequence[Tensor | None],
    retention: Sequence[Tensor | None],
    threshold: float,
    mode: str,
    lam: float,
    clip: float,
) -> list[Tensor]:
    """The published algorithm over lists of tensors, in float64, one operation after another."""
    shapes = [t if t is not None else r for t, r in zip(task, retention, strict=True)]
    g_t = [torch.zeros_like(s).double() if g is None else g.double() for g, s in zip(task, shapes, strict=True)]
    g_r = [torch.zeros_like(s).double() if g is None else g.double() for g, s in zip(retention, shapes, strict=True)]
    dot = sum((a * b).sum() for a, b in zip(g_t, g_r, strict=True))
    sq_t, sq_r = (sum(a.square().sum() for a in g) for g in (g_t, g_r))
    if dot / (sq_t.sqrt() * sq_r.sqrt()) < threshold:
        g_t = [a - dot / sq_r * b for a, b in zip(g_t, g_r, strict=True)]
    if mode == "weighted":
        merged = [a + lam * b for a, b in zip(g_t, g_r, strict=True)]
    elif mode == "equal":
        merged = [(a + b) / 2 for a, b in zip(g_t, g_r, strict=True)]
    else:
        merged = [a + min(lam, 1.0) * b for a, b in zip(g_t, g_r, strict=True)]
    norm = sum(g.square().sum() for g in merged).sqrt()
    return [g * min(1.0, clip / (norm + 1e-6)) for g in merged]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lam", [0.0, 0.4, 5.0])
@pytest.mark.parametrize("clip", [1.0, 1e6])
@pytest.mark.parametrize("lean", [-0.7, -0.2, 0.5])
def test_equals_the_algorithm_written_out(mode: str, lam: float, clip: float, lean: float) -> None:
    sizes = (700, 30, 1, 300)
    task, retention = (list(g.split(sizes)) for g in random_pair(7, sum(sizes), lean))
    task[1], retention[3] = None, None
    out = step_on(
        task, retention, multiplier=lam, conflict_threshold=-0.1, projection_mode=mode, max_norm=clip,
        projection_gate="always",
    )  # fmt: skip
    expected = reference_step(task, retention, -0.1, mode, lam, clip)
    assert out.metrics.conflict.item() is (lean < 0)
    for found, wanted in zip(out.gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lean", [-0.7, 0.5])
def test_both_one_sided_projections_together_are_pcgrad(seed: int, lean: float) -> None:
    """PCGrad projects each gradient off the other and adds; here only the task gradient is projected."""
    task, retention = random_pair(seed, lean=lean)
    ours = step((task, retention), conflict_threshold=0.0).flat + step((retention, task), conflict_threshold=0.0).flat
    torch.testing.assert_close(ours, PCGrad()(torch.stack([task, retention])), rtol=1e-4, atol=1e-5)
