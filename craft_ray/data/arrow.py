"""Rows in Arrow's layout, mapped from files into memory. Of a row, only the columns that the config names exist."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from craft_ray.data.cells import WrittenFloat

NARROW = {pa.float16(): np.float16, pa.float32(): np.float32}


class ArrowTable:
    """The rows of several files, each with its own types: none is converted because of what other files hold."""

    pads_mappings = True

    def __init__(
        self,
        files: Sequence[tuple[str, pa.Table]],
        column_names: Sequence[str],
        classes: Mapping[str, Sequence[str]] | None = None,
        identity: str = "",
    ) -> None:
        """
        Args:
            files: the name and the rows of each.
            column_names: all columns, including those that are not held.
            classes: the names that integers stand for, by the reference to them.
            identity: what decides the rows in addition to the files' content.
        """
        self.column_names = list(column_names)
        self.classes = classes or {}
        narrow = sorted({field.name for _, table in files for field in table.schema if field.type in NARROW})
        self.identity = f"{identity}{narrow or ''}"
        self._batches = [(name, batch) for name, table in files for batch in table.to_batches()]
        self._ends = list(accumulate(len(batch) for _, batch in self._batches))
        self._start, self._stop = 0, self._ends[-1] if self._ends else 0
        self._first: dict[str, int] = {}
        for (name, batch), end in zip(self._batches, self._ends, strict=True):
            self._first.setdefault(name, end - len(batch))

    def __len__(self) -> int:
        return self._stop - self._start

    def row(self, number: int) -> dict[str, Any]:
        at = self._at(number)
        batch = self._batches[at][1]
        within = self._start + number - self._ends[at] + len(batch)
        return {name: values(batch.column(name).slice(within, 1))[0] for name in batch.schema.names}

    def column(self, name: str) -> Iterator[Any]:
        for (_, batch), end in zip(self._batches, self._ends, strict=True):
            start = end - len(batch)
            first, last = max(self._start, start), min(self._stop, end)
            if first < last:
                part = batch.slice(first - start, last - first)
                yield from values(part.column(name)) if name in part.schema.names else [None] * len(part)

    def part(self, start: int, stop: int) -> ArrowTable:
        chosen = copy(self)
        chosen._start, chosen._stop = self._start + start, self._start + stop
        return chosen

    def place(self, number: int) -> tuple[str | None, int]:
        if len(self._first) < 2:
            return None, self._start + number
        name = self._batches[self._at(number)][0]
        return name, self._start + number - self._first[name]

    def _at(self, number: int) -> int:
        """The batch of a row."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return bisect_right(self._ends, self._start + number)


def values(cells: pa.Array) -> list[Any]:
    """Cells as Python's values: narrow fractions, which Python does not have, with the digits that identify them."""
    values = cells.to_pylist()
    narrow = NARROW.get(cells.type)
    return values if narrow is None else [None if v is None else WrittenFloat(str(narrow(v))) for v in values]


def mapped(path: Path) -> pa.Table:
    """An Arrow stream, mapped into memory."""
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        return reader.read_all()
