"""Rows with columns, as samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from blake3 import blake3

from craft_ray.config import Columns
from craft_ray.data.cells import cut, index_of, shown, text_of
from craft_ray.data.ids import Ids
from craft_ray.data.images import encoded_image
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError, first_line
from craft_ray.storage.paths import StoragePath


class Table(Protocol):
    """Rows by number, and columns by name: JSON lines, or a table in Arrow's layout."""

    column_names: list[str]
    """Of every column, with those that the config does not name."""
    classes: Mapping[str, Sequence[str]]
    """The names that stand behind the integers of a column."""
    identity: str
    """What decides the rows beside the content of the files."""

    def __len__(self) -> int: ...

    def row(self, number: int) -> dict[str, Any]:
        """Cells by column."""
        ...

    def column(self, name: str) -> Iterator[Any]: ...

    def part(self, start: int, stop: int) -> Table:
        """The rows from `start` to before `stop`."""
        ...

    def place(self, number: int) -> tuple[str | None, int]:
        """The file of a row and its number there; no file if there is only one."""
        ...


class TableSource:
    """The rows of a table."""

    features = None

    def __init__(self, name: str, table: Table, columns: Columns, folder: StoragePath, content: str) -> None:
        """
        Args:
            folder: base of relative image paths.
            content: hash of the rows and of how they are read.
        """
        self._table = table
        self._classes = table.classes
        self._columns = columns
        self._folder = folder
        self._content = content
        self.name = name
        self.has_responses = columns.response is not None or columns.answer_index is not None
        self.has_choices = columns.choices is not None

    @cached_property
    def fingerprint(self) -> str:
        """It includes the content of images, not their paths."""
        digest = blake3(self._content.encode())
        if self._columns.image is not None:
            for row, cell in enumerate(self._table.column(self._columns.image)):
                if isinstance(cell, dict) and not cell.get("bytes"):
                    cell = cell.get("path")
                if isinstance(cell, str):
                    digest.update(encoded_image(cell, self._folder, self._where(row)))
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Sample:
        try:
            cells = self._table.row(row)
        except (ValueError, OverflowError) as error:  # a string that is no UTF-8, a time outside Python's years
            raise DataError(
                f"{self._where(row)}: it does not read ({cut(first_line(error))}); fix or remove the row"
            ) from None
        return self._sample(cells, self._where(row), f"{row:08d}")

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def ids(self) -> Ids:
        ids = Ids(self._each_id())
        if ids.duplicate is not None:
            raise DataError(f"{self.name}: id {shown(ids.duplicate)} is in more than one row; ids must be unique")
        return ids

    def _each_id(self) -> Iterator[str]:
        column = self._columns.id
        if column is None:
            yield from (f"{row:08d}" for row in range(len(self)))
            return
        try:
            for row, value in enumerate(self._table.column(column)):
                # There may be very many: the common case needs no name for an error.
                plain = isinstance(value, str) and value.isascii()
                yield value if plain else self._text(value, column, self._where(row))
        except (ValueError, OverflowError) as error:
            raise DataError(f"{self.name}: column '{column}' does not read ({cut(first_line(error))})") from None

    def _where(self, row: int) -> str:
        file, number = self._table.place(row)
        return f"{self.name}, row {number}" if file is None else f"{self.name}: {file}, row {number}"

    def _text(self, value: Any, column: str, where: str) -> str:
        return text_of(value, where, column, self._classes)

    def _sample(self, cells: dict[str, Any], where: str, number: str) -> Sample:
        columns = self._columns

        def text(column: str) -> str:
            return self._text(cells.get(column), column, where)

        prompt = "" if columns.prompt is None else text(columns.prompt)
        choices = None
        if columns.choices is not None:
            options = cells.get(columns.choices)
            if not isinstance(options, list):
                raise DataError(
                    f"{where}: column '{columns.choices}' holds {shown(options)}; a list of answers is expected"
                )
            choices = tuple(self._text(option, columns.choices, where) for option in options)
        response = None if columns.response is None else text(columns.response)
        if columns.answer_index is not None:
            assert choices is not None, "Columns refuses an answer_index without choices"
            position = index_of(cells.get(columns.answer_index), len(choices), where, columns.answer_index)
            response = choices[position]
        return Sample(
            id=number if columns.id is None else text(columns.id),
            prompt=prompt,
            image=None if columns.image is None else encoded_image(cells.get(columns.image), self._folder, where),
            response=response,
            choices=choices,
        )


def named_columns(columns: Columns) -> list[str]:
    """The columns that are read."""
    return list(dict.fromkeys(name for name in columns.model_dump().values() if name is not None))


def text_columns(columns: Columns) -> list[str]:
    """The columns whose cells become text."""
    return list(dict.fromkeys(filter(None, (columns.id, columns.prompt, columns.response, columns.choices))))


def check_columns(columns: Columns, present: Sequence[str], path: str, key: str) -> None:
    """Check that the data has the columns.

    Raises:
        ConfigError: one is missing.
    """
    for role, column in columns.model_dump().items():
        if column is not None and column not in present:
            raise ConfigError(
                f"{key}.columns.{role} is '{column}', but {path} has the columns {cut(', '.join(present))}: "
                f"specify one of them, or null"
            )
