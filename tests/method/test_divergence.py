"""The divergence over the teacher's most likely tokens and the rest's mass, against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from craft_ray.method.divergence import class_log_probs, divergence, squared_surprise, top_tokens

N, V = 6, 11


def logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


def loss(student: Tensor, teacher: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    tokens = top_tokens(teacher, k)
    return divergence(class_log_probs(student, tokens, temperature), class_log_probs(teacher, tokens, temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_with_the_whole_vocabulary_it_is_the_kl_divergence(temperature: float) -> None:
    teacher, student = logits(0), logits(1)
    p, q = ((z.double() / temperature).log_softmax(1) for z in (teacher, student))
    expected = kl_div(q, p, reduction="batchmean", log_target=True)
    assert loss(student, teacher, V, temperature).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_rest_is_one_class_by_hand() -> None:
    """Four tokens, two kept, at temperature 2: e^(z/2) is 4, 2, 1, 1 for the teacher and 1, 1, 1, 5 for the student."""
    teacher, student = (2 * torch.tensor([weights]).log() for weights in ([2.0, 1.0, 4.0, 1.0], [1.0, 5.0, 1.0, 1.0]))
    assert top_tokens(teacher, 2).tolist() == [[2, 0]]
    p, q = np.array([4, 2, 2]) / 8, np.array([1, 1, 6]) / 8
    assert loss(student, teacher, 2, 2.0).item() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-6)


def test_more_tokens_see_more_and_never_more_than_all() -> None:
    losses = [loss(logits(1), logits(0), k).item() for k in range(1, V + 1)]
    assert losses == sorted(losses)
    assert losses[0] > 0
    assert losses[-2] == pytest.approx(losses[-1], rel=1e-6)  # a rest of one token is that token


@pytest.mark.parametrize("k", [1, 4, V])
def test_the_gradient_is_that_of_the_formula_and_zero_at_the_teacher(k: int) -> None:
    """With respect to logit j: (q_j - p_j) / T for a kept token, (q_j - p_rest q_j / q_rest) / T for another."""
    temperature, teacher = 2.0, logits(0)
    student = logits(1).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, teacher, k, temperature), student)
    p, q = ((z.detach().double() / temperature).softmax(1) for z in (teacher, student))
    kept = torch.zeros(N, V, dtype=torch.bool).scatter(1, top_tokens(teacher, k), True)
    rest = (p.masked_fill(kept, 0).sum(1) / q.masked_fill(kept, 0).sum(1).clamp(min=1e-300))[:, None]
    expected = torch.where(kept, q - p, q - rest * q) / temperature / N
    torch.testing.assert_close(gradient.double(), expected, atol=1e-7, rtol=1e-5)

    same = teacher.clone().requires_grad_()
    value = loss(same, teacher, k, temperature)
    assert value.item() == 0.0
    assert torch.autograd.grad(value, same)[0].abs().max() < 1e-9


def test_far_students_and_tokens_that_are_ruled_out_stay_finite() -> None:
    teacher, student = logits(0, 200.0), logits(1, 200.0)
    p, q = (z.double().log_softmax(1) for z in (teacher, student))
    exact = kl_div(q, p, reduction="batchmean", log_target=True)
    assert loss(student, teacher, V).item() == pytest.approx(exact.item(), rel=1e-5)
    for z in (teacher, student):
        z[:, :8] = -torch.inf
    student.requires_grad_()
    for k in (2, 5, V):
        value = loss(student, teacher, k)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_rounding_of_log_probabilities_causes_half_its_mean_square() -> None:
    teacher = class_log_probs(logits(0, 1.0), top_tokens(logits(0, 1.0), 4), 1.0)
    relative, losses = 1e-3, []
    for seed in range(400):
        noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(seed))
        losses.append(divergence((teacher * (1 + relative**0.5 * noise)).log_softmax(1), teacher).item())
    bound = relative / 2 * squared_surprise(teacher)
    assert 0.3 * bound < float(np.mean(losses)) < bound
