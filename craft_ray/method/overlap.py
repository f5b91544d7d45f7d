"""Summing a gradient over the workers while the backward pass still computes the rest of it.

The memory of a gradient is summed in buckets, from the last parameter to the first, which is about the order in which
a backward pass finishes them (Li et al., "PyTorch Distributed", arXiv 2006.15704).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from craft_ray.workers import Pending

BUCKET_BYTES = 25 << 20
"""As in DistributedDataParallel: large enough for the network's speed, small enough to begin early."""


class AllReduce(Protocol):
    """Sums a tensor over the workers, in place. With one worker there is nothing to do."""

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, tensor: Tensor) -> None: ...

    def start_all_reduce(self, tensor: Tensor) -> Pending: ...


@dataclass(frozen=True)
class Span:
    """Where a parameter's gradient is: in `buffer`, from `start` to `stop`."""

    buffer: int
    start: int
    stop: int


@dataclass
class _Bucket:
    span: Span
    parameters: frozenset[int]


class BucketedSum:
    """Sums gradients over the workers as they become complete.

    All workers sum the buckets in the same order: a complete bucket waits for those before it, and one with a
    parameter that this pass does not reach for the end of the pass.

    Args:
        spans: of each parameter, in the order of the forward pass.
        sizes: bytes of an element of each buffer.
    """

    def __init__(self, spans: Sequence[Span], sizes: Sequence[int]) -> None:
        self._buckets = _buckets(spans, sizes)
        self._bucket_of = {i: number for number, bucket in enumerate(self._buckets) for i in bucket.parameters}
        self._rows: Sequence[Tensor] | None = None

    def begin(self, rows: Sequence[Tensor], workers: AllReduce) -> None:
        """Sum these rows, one of each buffer, in the backward pass that follows, which is the last to add to them."""
        self._rows, self._workers = rows, workers
        self._missing = [set(bucket.parameters) for bucket in self._buckets]
        self._begun: list[Pending] = []

    def ready(self, index: int) -> None:
        """The gradient of parameter `index` is complete."""
        if self._rows is None:
            return
        missing = self._missing[self._bucket_of[index]]
        assert index in missing, "a backward pass accumulates each gradient once"
        missing.remove(index)
        while len(self._begun) < len(self._buckets) and not self._missing[len(self._begun)]:
            self._start_next(self._rows)

    def finish(self) -> None:
        """Wait until the rows are summed."""
        assert self._rows is not None
        while len(self._begun) < len(self._buckets):
            self._start_next(self._rows)
        self._rows = None
        for pending in self._begun:
            pending.wait()

    def _start_next(self, rows: Sequence[Tensor]) -> None:
        span = self._buckets[len(self._begun)].span
        self._begun.append(self._workers.start_all_reduce(rows[span.buffer][span.start : span.stop]))


def _buckets(spans: Sequence[Span], sizes: Sequence[int]) -> list[_Bucket]:
    """Neighbouring parameters together, from the last to the first."""
    buckets: list[_Bucket] = []
    for buffer, size in enumerate(sizes):
        group: list[int] = []
        for index in reversed([i for i, span in enumerate(spans) if span.buffer == buffer]):
            group.append(index)
            if (spans[group[0]].stop - spans[index].start) * size >= BUCKET_BYTES:
                buckets.append(_bucket(buffer, group, spans))
                group = []
        if group:
            buckets.append(_bucket(buffer, group, spans))
    return sorted(buckets, key=lambda bucket: -max(bucket.parameters))


def _bucket(buffer: int, group: Sequence[int], spans: Sequence[Span]) -> _Bucket:
    return _Bucket(Span(buffer, spans[group[-1]].start, spans[group[0]].stop), frozenset(group))
