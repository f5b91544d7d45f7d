"""The ids of many rows in little memory: a build keeps all of them from start to end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa

CHUNK = 1 << 16
"""Ids that are Python strings at a time."""


class Ids(Sequence[str]):
    """A sequence of ids, in their own bytes and four more each; a list takes fifty-seven more. A slice is a list."""

    def __init__(self, ids: Iterable[str]) -> None:
        rest = iter(ids)
        chunks, hashes = [], []
        while part := list(islice(rest, CHUNK)):
            chunks.append(pa.array(part, pa.string()))
            hashes.append(np.fromiter(map(hash, part), np.int64, len(part)))
        self._ids = pa.chunked_array(chunks, pa.string())
        self._duplicate = self._first_duplicate(hashes)

    @property
    def duplicate(self) -> str | None:
        """An id that more than one row has; None if ids are unique."""
        return self._duplicate

    def _first_duplicate(self, hashes: list[np.ndarray]) -> str | None:
        """Equal ids have equal hashes; ids with equal hashes are compared themselves."""
        if not hashes:
            return None
        ordered = np.concatenate(hashes)
        ordered.sort()
        twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        seen: set[str] = set()
        for id_ in self if twice else ():
            if hash(id_) in twice:
                if id_ in seen:
                    return id_
                seen.add(id_)
        return None

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        found: Any = self._ids[row]
        return found.to_pylist() if isinstance(row, slice) else found.as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._ids.chunks:
            yield from chunk.to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # like a list's
