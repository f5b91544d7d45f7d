"""Rows of different lengths in two memory-mapped files: the flat data, and where each row starts.

Parquet is the archive; reading a random batch from it costs a hundred times as much as a gather from memory. So a
cache is expanded into these files, once on each node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


class Ragged:
    """`rows[i]` is row i, [n_i, width] (or [n_i] where width is 1), a view into the mapped file."""

    def __init__(self, path: Path, dtype: np.dtype, width: int = 1) -> None:
        self._files = path, dtype, width
        self.offsets: np.ndarray = np.load(path.with_suffix(".offsets.npy"), mmap_mode="r")
        total = int(self.offsets[-1])
        shape = (total,) if width == 1 else (total, width)
        empty = total == 0  # an empty file cannot be mapped
        self.data: np.ndarray = (
            np.empty(shape, dtype) if empty else np.memmap(path.with_suffix(".bin"), dtype, "r", shape=shape)
        )

    def __reduce__(self) -> tuple[type[Ragged], tuple[Path, np.dtype, int]]:
        """Another process maps the files itself."""
        return Ragged, self._files

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.data[self.offsets[row] : self.offsets[row + 1]]

    def gather(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows padded to the longest: values [B, V, width], and which are real, [B, V]. It takes one gather."""
        chosen = np.asarray(rows)
        starts, counts = self.offsets[chosen], self.offsets[chosen + 1] - self.offsets[chosen]
        slots = np.arange(counts.max(initial=0))
        valid = slots < counts[:, None]
        return self.data[np.where(valid, starts[:, None] + slots, starts[:, None])], valid


def write_ragged(path: Path, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write chunks of (flat data, lengths of rows) one after another."""
    lengths = [np.zeros(1, np.int64)]
    with path.with_suffix(".bin").open("wb") as file:
        for data, counts in chunks:
            file.write(np.ascontiguousarray(data).data)
            lengths.append(counts.astype(np.int64))
    np.save(path.with_suffix(".offsets.npy"), np.cumsum(np.concatenate(lengths)))
