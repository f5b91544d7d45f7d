"""Which samples a step uses: a pure function of (seed, step), the same for any number of workers.

So a resumed run needs no state of the sampler, and N workers see the global batch that one worker sees.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

CYCLE = 1000
"""Samples of a mixture, at least, after which every source has had its part: a weight is met to a thousandth."""


class Sampler(ABC):
    """Batches of consecutive places in an endless order of rows."""

    batch_size: int

    @abstractmethod
    def row(self, place: int) -> int:
        """The row at a place of the order."""

    def global_batch(self, step: int) -> list[int]:
        """The rows of a step's batch, [batch_size]."""
        first = step * self.batch_size
        return [self.row(place) for place in range(first, first + self.batch_size)]

    def local_batch(self, step: int, rank: int, world_size: int) -> list[int]:
        """A worker's consecutive part of the global batch."""
        assert self.batch_size % world_size == 0
        size = self.batch_size // world_size
        return self.global_batch(step)[rank * size : (rank + 1) * size]


class InOrder(Sampler):
    """Global batches over a source that is itself in an endless order."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def row(self, place: int) -> int:
        return place


class StepSampler(Sampler):
    """Global batches over `rows` samples: a new permutation each epoch; batches may cross its end.

    Args:
        stream: gives task and anchors different orders under one seed.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, stream: int | tuple[int, ...]) -> None:
        assert rows > 0
        self.rows = rows
        self.batch_size = batch_size
        self._key = (seed, *(stream if isinstance(stream, tuple) else (stream,)))
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def row(self, place: int) -> int:
        epoch, offset = divmod(place, self.rows)
        if epoch != self._epoch:
            self._order = np.random.default_rng([*self._key, epoch]).permutation(self.rows)
            self._epoch = epoch
        return int(self._order[offset])


class MixtureSampler(Sampler):
    """Global batches from several sources by weight, in the order in which the sources are joined.

    A cycle is a permutation in which each source has as many places as its weight asks for, so every cycle holds the
    parts exactly. A source is traversed by permutations of its own: no row returns before all others have come.

    Args:
        rows: the number of rows of each source.
        weights: relative to each other.
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float], batch_size: int, seed: int, stream: int) -> None:
        total = sum(weights)
        length = max(CYCLE, *(math.ceil(total / weight) for weight in weights))
        exact = [length * weight / total for weight in weights]
        self.places = [int(part) for part in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: self.places[i] - exact[i])
        for i in by_remainder[: length - sum(self.places)]:
            self.places[i] += 1
        self.batch_size = batch_size
        self._key = (seed, stream)
        self._starts = [0, *itertools.accumulate(rows)]
        self._inner = [StepSampler(count, 1, seed, (stream, number)) for number, count in enumerate(rows)]
        self._cycle = -1
        self._order = np.empty((0, 2), dtype=np.int64)

    def row(self, place: int) -> int:
        cycle, offset = divmod(place, sum(self.places))
        if cycle != self._cycle:
            each = np.repeat(np.arange(len(self.places)), self.places)
            sources = np.random.default_rng([*self._key, len(self.places), cycle]).permutation(each)
            within = np.empty_like(sources)
            for number, count in enumerate(self.places):
                within[sources == number] = np.arange(count)
            self._order, self._cycle = np.stack([sources, within], 1), cycle
        source, nth = (int(number) for number in self._order[offset])
        return self._starts[source] + self._inner[source].row(cycle * self.places[source] + nth)
