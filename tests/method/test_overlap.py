"""A gradient is summed over the workers in buckets, in one order, each when it is complete."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from craft_ray.method import overlap
from craft_ray.method.gradients import GradientPair
from craft_ray.method.overlap import BucketedSum, Span


@dataclass
class Recorder:
    """Two equal workers: a sum doubles. It records what was begun, and when it was waited for."""

    world_size: int = 2
    begun: list[int] = field(default_factory=list)
    waited: int = 0

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.mul_(2)

    def start_all_reduce(self, tensor: Tensor) -> Recorder:
        self.begun.append(tensor.numel())
        tensor.mul_(2)
        return self

    def wait(self) -> None:
        self.waited += 1


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 16)


@pytest.mark.usefixtures("small_buckets")
def test_a_bucket_is_summed_when_it_is_complete_and_those_before_it_have_begun() -> None:
    """Parameters of 3, 1, 2 and 4 numbers: in buckets of at least 16 bytes they are {3} and {2, 1, 0}."""
    spans = [Span(0, 0, 3), Span(0, 3, 4), Span(0, 4, 6), Span(0, 6, 10)]
    row, workers = torch.ones(12), Recorder()
    summed = BucketedSum(spans, [4])
    summed.ready(3)  # nothing is summed outside of a pass that is the last
    summed.begin([row], workers)
    for index in (0, 1, 2):
        summed.ready(index)
        assert not workers.begun
    summed.ready(3)
    assert workers.begun == [4, 6]
    assert not workers.waited
    summed.finish()
    assert workers.waited == len(workers.begun)
    assert row.tolist() == [2.0] * 10 + [1.0] * 2


@pytest.mark.usefixtures("small_buckets")
def test_what_a_pass_does_not_reach_is_summed_at_its_end() -> None:
    row, workers = torch.ones(10), Recorder()
    summed = BucketedSum([Span(0, 0, 5), Span(0, 5, 10)], [4])
    summed.begin([row], workers)
    summed.ready(0)
    assert not workers.begun, "the bucket before it has not begun, as on a worker that does reach it"
    summed.finish()
    assert row.tolist() == [2.0] * 10


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_sums_begin_in_the_last_backward_pass(micro_batches: int) -> None:
    first, second = (torch.zeros(8, requires_grad=True) for _ in range(2))
    pair, workers = GradientPair([("first", first), ("second", second)]), Recorder()
    begun: list[int] = []

    class Batch:
        count = 2

    def loss(_: Batch) -> Tensor:
        begun.append(len(workers.begun))
        return first.sum() + second.sum()

    mean = pair.backward(1, loss, [Batch()] * micro_batches, workers)  # type: ignore[arg-type]
    assert begun == [0] * micro_batches
    assert workers.begun == [8, 8]
    assert workers.waited == 2
    assert mean == 0
    assert pair.buffers[0][1, :16].tolist() == [1.0] * 16, "each worker has half of the terms"
