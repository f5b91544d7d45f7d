"""Which samples a step uses: a pure function of (seed, step), the same for any number of workers.

So a resumed run needs no state of the sampler, and N workers see the global batch that one worker sees.
"""

from __future__ import annotations

import numpy as np


class StepSampler:
    """Global batches over `rows` samples: a new permutation each epoch; batches may cross its end.

    Args:
        stream: gives task and anchors different orders under one seed.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, stream: int) -> None:
        assert rows > 0
        self.rows = rows
        self.batch_size = batch_size
        self._key = (seed, stream)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def global_batch(self, step: int) -> list[int]:
        """The rows of a step's batch, [batch_size]."""
        first = step * self.batch_size
        return [self._row(index) for index in range(first, first + self.batch_size)]

    def local_batch(self, step: int, rank: int, world_size: int) -> list[int]:
        """A worker's consecutive part of the global batch."""
        assert self.batch_size % world_size == 0
        size = self.batch_size // world_size
        return self.global_batch(step)[rank * size : (rank + 1) * size]

    def _row(self, index: int) -> int:
        epoch, offset = divmod(index, self.rows)
        if epoch != self._epoch:
            self._order = np.random.default_rng([*self._key, epoch]).permutation(self.rows)
            self._epoch = epoch
        return int(self._order[offset])
