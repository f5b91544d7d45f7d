"""Retention losses on vectors that are written down by hand, and the properties that all of them have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from craft_ray.method.distance import hidden_loss
from craft_ray.method.pooling import Vectors

LOSSES = ("relative_mse", "mse", "cosine", "l1")


def one(*values: float) -> Vectors:
    """One sample, one layer, one vector."""
    return Vectors(torch.tensor(values).view(1, 1, 1, -1), torch.ones(1, 1, dtype=torch.bool))


def vectors(values_BLVD: Tensor, counts: list[int] | None = None) -> Vectors:
    most = values_BLVD.shape[2]
    counts = counts or [most] * len(values_BLVD)
    return Vectors(values_BLVD, torch.arange(most) < torch.tensor(counts)[:, None])


def random_vectors(seed: int, counts: list[int], dtype: torch.dtype = torch.float32) -> Vectors:
    generator = torch.Generator().manual_seed(seed)
    return vectors(torch.randn(len(counts), 2, max(counts), 6, generator=generator).to(dtype), counts)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [("relative_mse", 5 / 25), ("mse", 5 / 2), ("cosine", 1 - 20 / (math.sqrt(20) * 5)), ("l1", 3 / 2)],
)
def test_known_answers(loss_type: str, expected: float) -> None:
    assert hidden_loss(one(2.0, 4.0), one(4.0, 3.0), loss_type).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_teacher_has_no_distance_from_itself(loss_type: str) -> None:
    teacher = random_vectors(0, [3, 1, 2])
    student = Vectors(teacher.values_BLVD.clone().requires_grad_(), teacher.valid_BV)
    loss = hidden_loss(student, teacher, loss_type)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.values_BLVD.grad.abs().max() < (1e-6 if loss_type != "l1" else 1.0)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("padding", [1e30, float("inf"), float("nan")])
def test_padding_does_not_count(loss_type: str, padding: float) -> None:
    student, teacher = random_vectors(0, [3, 1, 2]), random_vectors(1, [3, 1, 2])
    clean = hidden_loss(student, teacher, loss_type)
    outside = ~student.valid_BV[:, None, :, None]
    dirty = hidden_loss(
        Vectors(student.values_BLVD.masked_fill(outside, padding), student.valid_BV),
        Vectors(teacher.values_BLVD.masked_fill(outside, 0.0), teacher.valid_BV),
        loss_type,
    )
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_gradient_of_padding_is_zero(loss_type: str) -> None:
    """The cache pads with zeros, and a relative distance from zero is enormous."""
    teacher = random_vectors(1, [3, 1, 2])
    teacher = Vectors(teacher.values_BLVD.masked_fill(~teacher.valid_BV[:, None, :, None], 0.0), teacher.valid_BV)
    values = (100 * random_vectors(0, [3, 1, 2]).values_BLVD).requires_grad_()
    hidden_loss(Vectors(values, teacher.valid_BV), teacher, loss_type).backward()
    assert values.grad.isfinite().all()
    assert not values.grad.transpose(1, 2)[~teacher.valid_BV].any()
    assert values.grad.transpose(1, 2)[teacher.valid_BV].any()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_samples_weigh_the_same_however_many_vectors_they_have(loss_type: str) -> None:
    """So the mean over batches of equal size is the mean over their samples."""
    counts = [4, 1, 2]
    student, teacher = random_vectors(0, counts), random_vectors(1, counts)
    alone = [
        hidden_loss(
            vectors(student.values_BLVD[i : i + 1, :, :n]), vectors(teacher.values_BLVD[i : i + 1, :, :n]), loss_type
        )
        for i, n in enumerate(counts)
    ]
    torch.testing.assert_close(hidden_loss(student, teacher, loss_type), torch.stack(alone).mean())


@pytest.mark.parametrize("loss_type", LOSSES)
def test_layers_weigh_the_same(loss_type: str) -> None:
    student, teacher = random_vectors(0, [3, 1]), random_vectors(1, [3, 1])
    layers = [
        hidden_loss(
            Vectors(student.values_BLVD[:, [k]], student.valid_BV),
            Vectors(teacher.values_BLVD[:, [k]], teacher.valid_BV),
            loss_type,
        )
        for k in (0, 1)
    ]
    torch.testing.assert_close(hidden_loss(student, teacher, loss_type), torch.stack(layers).mean())


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_computed_in_float32(loss_type: str, dtype: torch.dtype) -> None:
    """Squares of these would overflow float16."""
    student, teacher = random_vectors(0, [3, 1, 2]), random_vectors(1, [3, 1, 2])
    short = [Vectors((300 * v.values_BLVD).to(dtype), v.valid_BV) for v in (student, teacher)]
    widened = [Vectors(v.values_BLVD.float(), v.valid_BV) for v in short]
    loss = hidden_loss(*short, loss_type)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert torch.equal(loss, hidden_loss(*widened, loss_type))


@pytest.mark.parametrize("loss_type", ["relative_mse", "cosine"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_teachers_size_is_the_unit(loss_type: str, scale: float) -> None:
    student, teacher = random_vectors(0, [3, 1]), random_vectors(1, [3, 1])
    scaled = [Vectors(scale * v.values_BLVD, v.valid_BV) for v in (student, teacher)]
    torch.testing.assert_close(hidden_loss(*scaled, loss_type), hidden_loss(student, teacher, loss_type))


def test_a_relative_distance_is_relative_to_each_layer_and_vector() -> None:
    """A layer of large activations does not drown the others: 10 % off is 0.01 in each."""
    teacher = random_vectors(0, [3, 1])
    size = torch.tensor([1.0, 1000.0]).view(1, 2, 1, 1)
    teacher = Vectors(teacher.values_BLVD * size, teacher.valid_BV)
    for layer in (0, 1):
        moved = teacher.values_BLVD.clone()
        moved[:, layer] *= 1.1
        assert hidden_loss(Vectors(moved, teacher.valid_BV), teacher).item() == pytest.approx(0.01 / 2, rel=1e-4)


def test_a_zero_teacher_vector_gives_a_finite_loss_and_gradient() -> None:
    for loss_type in LOSSES:
        values = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
        loss = hidden_loss(Vectors(values, torch.ones(1, 1, dtype=torch.bool)), one(0.0, 0.0), loss_type)
        loss.backward()
        assert loss.isfinite()
        assert values.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 2, 3, 5), (2, 1, 3, 6), (2, 2, 4, 6), (1, 2, 3, 6)])
def test_another_shape_is_an_error_that_names_both(shape: tuple[int, ...]) -> None:
    student, teacher = vectors(torch.zeros(2, 2, 3, 6)), vectors(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(2, 2, 3, 6\)") as error:
        hidden_loss(student, teacher)
    assert str(shape) in str(error.value)


def test_an_unknown_loss_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"huber.*relative_mse, mse, cosine or l1"):
        hidden_loss(one(1.0), one(1.0), "huber")
