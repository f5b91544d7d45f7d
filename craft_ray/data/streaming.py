"""Task data that do not fit the disk: read from the hub as training needs them, never as a whole.

The order is Hugging Face datasets' own: the files of a pass are shuffled, and their rows go through a buffer from which
they are drawn at random. It is a function of (seed, pass), so that any number of workers sees the same global batches,
and a resumed run continues with the row that was next. Unlike in an order of
known rows, a row can be drawn only near the rows that its file is read with, and to get to a place, everything before
it is read.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from blake3 import blake3

from craft_ray.config import HuggingFaceData, recognised
from craft_ray.data.arrow import values
from craft_ray.data.cells import cut
from craft_ray.data.classes import classes_of
from craft_ray.data.hugging_face import WRITTEN
from craft_ray.data.place import Place
from craft_ray.data.table import TableSource, check_columns, named_columns
from craft_ray.errors import DataError, first_line
from craft_ray.storage.files import checksum
from craft_ray.storage.paths import StoragePath

HEAD = 1000
"""Rows, from the first in the order, that are kept in memory: they are checked before the first step."""


class Stream:
    """The rows of a data set by their place in an endless order of passes.

    Args:
        rows: the data set, whose rows are tables of one row.
        buffer: rows from which the next one is drawn.
        key: seed of the order; None keeps the order of the files.
    """

    def __init__(self, rows: Any, buffer: int, key: tuple[int, ...] | None, name: str) -> None:
        self._rows, self._buffer, self._key, self._name = rows, buffer, key, name
        self._lock = Lock()  # rows are checked in several threads
        self._head: list[pa.Table] = []
        self._length: int | None = None
        self._restart(0)

    def row(self, place: int) -> pa.Table:
        """The row at a place. Going back costs a new start, except within the first rows.

        Raises:
            DataError: it cannot be read.
        """
        with self._lock:
            if place < len(self._head):
                return self._head[place]
            if place < self._next:
                self._restart(place)
            while self._next < place:
                self._advance()
            return self._advance()

    def head(self) -> int:
        """How many of the first rows are kept: at most those of one pass."""
        while len(self._head) < HEAD and self._length is None:
            self.row(len(self._head))
        return min(len(self._head), self._length or HEAD)

    def _advance(self) -> pa.Table:
        """The next row; after the last row of a pass, the first of another one."""
        try:
            row = next(self._pass, None)
        except Exception as error:  # of the network, of a file, of a library
            reason = cut(first_line(error.__cause__ or error))
            raise DataError(
                f"{self._name} cannot be read beyond {self._next} rows ({reason}): fix that, and resume the run"
            ) from None
        if row is None:
            if self._next == self._start:
                raise DataError(f"{self._name} holds no sample; specify data with at least one row")
            self._length = self._next - self._start
            self._begin(self._next)
            return self._advance()
        if self._next == len(self._head) < HEAD:
            self._head.append(row)
        self._next += 1
        return row

    def _restart(self, place: int) -> None:
        """Start the pass of a place again; if the length of passes is unknown, the first one."""
        self._begin(0 if self._length is None else place // self._length * self._length)

    def _begin(self, start: int) -> None:
        """Begin the pass whose first row has this place."""
        rows, self._start, self._next = self._rows, start, start
        if self._key is not None:
            number = start // self._length if self._length else 0
            drawn = np.random.default_rng([*self._key, number])
            rows = rows.shuffle(generator=drawn, buffer_size=self._buffer)
        self._pass: Iterator[pa.Table] = iter(rows)


class StreamTable:
    """A stream as a table: rows by their place, and no length."""

    pads_mappings = True

    def __init__(self, stream: Stream, column_names: Sequence[str], classes: dict[str, Sequence[str]]) -> None:
        self.stream = stream
        self.column_names = list(column_names)
        self.classes: Mapping[str, Sequence[str]] = classes
        self.identity = ""

    def __len__(self) -> int:
        raise AssertionError("nobody knows how many rows a stream has")

    def row(self, number: int) -> dict[str, Any]:
        row = self.stream.row(number)
        return {name: values(row.column(name).combine_chunks())[0] for name in row.column_names}

    def column(self, name: str) -> Iterator[Any]:
        raise AssertionError("a stream has no end")

    def part(self, start: int, stop: int) -> StreamTable:
        raise AssertionError("a stream has no end")

    def place(self, number: int) -> tuple[str | None, int]:
        return None, number


class StreamedSource(TableSource):
    """The samples of a stream, by their place in its order."""

    def __init__(self, config: HuggingFaceData, rows: Any, folder: StoragePath, content: str, key: str) -> None:
        names = list(rows.features)
        check_columns(config.columns, names, config.path, key)
        present = [name for name in named_columns(config.columns) if name in names]
        features = rows.features
        self._features = features
        self._classes_of = classes_of(features.to_dict(), named_columns(config.columns))
        self._rows = rows.select_columns(present).with_format("arrow")
        self._names, self._buffer = names, config.shuffle_buffer
        self._where = f"{key}: {config.path}"
        super().__init__(config.path, self._table_in(None), config.columns, folder, content)

    @property
    def fingerprint(self) -> str:  # nothing to keep: no row is read for it
        return self._content[:32]

    def place(self, row: int) -> Place:
        return Place(self.name, f"sample {row} in the order of the seed")

    def _holds_lists(self, column: str) -> bool:
        # By its type: inspecting the first rows would start the stream again.
        depth, inner = 0, self._features.get(column)
        while isinstance(inner, datasets.List | datasets.LargeList):
            depth, inner = depth + 1, inner.feature
        number = isinstance(inner, datasets.Value) and inner.dtype.startswith(("int", "uint", "float"))
        return depth > 3 or (depth == 1 and not number)

    def in_order_of(self, *key: int) -> StreamedSource:
        """The same samples in the order of a seed."""
        other = copy(self)
        other._table = other._table_in(key)
        return other

    def checkable(self) -> int:
        """How many samples, from the first, can be asked for in any order."""
        assert isinstance(self._table, StreamTable)
        return self._table.stream.head()

    def _table_in(self, key: tuple[int, ...] | None) -> StreamTable:
        stream = Stream(self._rows, self._buffer, key, self._where)
        return StreamTable(stream, self._names, self._classes_of)


def open_stream(config: HuggingFaceData, folder: StoragePath, key: str) -> StreamedSource:
    """The samples of a data set on the hub, or in a folder in its layout, without storing them.

    Raises:
        ValueError: there is no such split, or the library would convert values.
        ConfigError: a named column is missing.
    """
    if Path(config.path).exists() and (glob.has_magic(config.path) or "::" in config.path):
        raise ValueError("Hugging Face datasets takes [ ] * ? :: in a path for a pattern; rename the folder")
    builder = datasets.load_dataset_builder(config.path, revision=config.revision)
    written = WRITTEN.get(builder.info.builder_name or "")
    if written is not None:
        raise ValueError(
            f"its {written} files are streamed by the library, which converts their values (007 becomes 7); the hub "
            f"has a copy in Parquet (revision: refs/convert/parquet), or leave streaming out"
        )
    rows = datasets.load_dataset(config.path, split=config.split, revision=config.revision, streaming=True)
    if rows.features is None:
        rows = rows._resolve_features()
    if config.limit is not None:
        rows = rows.take(config.limit)
    config = config.model_copy(update={"columns": recognised(config.columns, list(rows.features))})
    return StreamedSource(config, rows, folder, _identity(builder, config), key)


def _identity(builder: datasets.DatasetBuilder, config: HuggingFaceData) -> str:
    """Hash of the content: for a folder, the names and checksums of its files; for the hub, where nothing is read for
    it, the commit and the names."""
    digest = blake3(f"stream, datasets {version('datasets')}".encode())
    of_split = (builder.config.data_files or {}).get(config.split, [])
    digest.update(str(builder.hash if not of_split else "").encode())
    for number, file in enumerate(of_split):
        path = Path(file)
        identity = (path.name, checksum(path)) if path.exists() else (file, of_split.origin_metadata[number])
        digest.update(str(identity).encode())
    how = config.model_dump_json(include={"split", "limit", "columns", "shuffle_buffer"}, exclude_none=True)
    digest.update(how.encode())
    return digest.hexdigest()
