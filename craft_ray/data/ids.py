"""The ids of many rows in little memory: a build knows all of them from its beginning to its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa

CHUNK = 1 << 16
"""Ids that are Python strings at once."""


class Ids(Sequence[str]):
    """A sequence of ids, in their own bytes and four more each; a list takes fifty-seven more. A part is a list."""

    def __init__(self, ids: Iterable[str]) -> None:
        rest = iter(ids)
        chunks, hashes = [], []
        while part := list(islice(rest, CHUNK)):
            chunks.append(pa.array(part, pa.string()))
            hashes.append(np.fromiter(map(hash, part), np.int64, len(part)))
        self._ids = pa.chunked_array(chunks, pa.string())
        self._double = self._first_double(hashes)

    @property
    def double(self) -> str | None:
        """An id that stands in more than one row."""
        return self._double

    def _first_double(self, hashes: list[np.ndarray]) -> str | None:
        """Two equal ids have equal hashes; what else has equal ones is compared itself."""
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
