"""Rows with columns, as samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

from blake3 import blake3

from craft_ray.config import Columns
from craft_ray.data.conversation import Conversation, alpaca, content_text, image_paths, read_conversation
from craft_ray.data.ids import CHUNK, Ids
from craft_ray.data.images import encoded_image
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError
from craft_ray.storage.paths import StoragePath


class Table(Protocol):
    """Rows by number, and columns by name: JSON lines, or a table of Hugging Face datasets."""

    column_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any: ...

    def select(self, rows: Any) -> Table: ...


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
        self._columns = columns
        self._folder = folder
        self._content = content
        self.name = name
        self.has_conversations = columns.messages is not None
        self.has_responses = bool(columns.response or columns.answer_index or columns.messages)
        self.has_choices = columns.choices is not None

    @cached_property
    def fingerprint(self) -> str:
        """It includes the content of images, not their paths."""
        digest = blake3(self._content.encode())
        if self._columns.image is not None:
            for row, cell in enumerate(self._table[self._columns.image]):
                for image in _image_cells(cell) if self.has_conversations else (cell,):
                    if isinstance(image, dict) and not image.get("bytes"):
                        image = image.get("path")
                    if isinstance(image, str):
                        digest.update(encoded_image(image, self._folder, f"{self.name}, row {row}"))
        if self._columns.messages is not None:
            for row, cell in enumerate(self._table[self._columns.messages]):
                for path in image_paths(cell):
                    digest.update(encoded_image(path, self._folder, f"{self.name}, row {row}"))
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Sample:
        return self._sample(row, self._table[row])

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def ids(self) -> Ids:
        ids = Ids(self._each_id())
        if ids.duplicate is not None:
            raise DataError(f"{self.name}: id '{ids.duplicate}' is in more than one row; ids must be unique")
        return ids

    def _each_id(self) -> Iterator[str]:
        column = self._columns.id
        if column is None:
            yield from (f"{row:08d}" for row in range(len(self)))
            return
        cells = self._table[column]
        for start in range(0, len(self), CHUNK):  # reading them one by one takes ten times as long
            for row, value in enumerate(cells[start : start + CHUNK], start):
                yield _text(value, f"{self.name}, row {row}", column)

    def _sample(self, row: int, cells: dict[str, Any]) -> Sample:
        columns = self._columns
        where = f"{self.name}, row {row}"
        image = choices = conversation = None
        if columns.messages is not None:
            conversation = self._conversation(cells, columns.messages, where)
            image = conversation.images[0] if conversation.images else None
        elif columns.image is not None:
            image = encoded_image(cells[columns.image], self._folder, where)
        if columns.choices is not None:
            options = cells[columns.choices]
            if not isinstance(options, list):
                raise DataError(f"{where}: column '{columns.choices}' holds {options!r}; a list of answers is expected")
            choices = tuple(_text(option, where, columns.choices) for option in options)
        return Sample(
            id=f"{row:08d}" if columns.id is None else _text(cells[columns.id], where, columns.id),
            prompt=self._prompt(cells, conversation, where),
            image=image,
            response=self._response(cells, choices, conversation, where),
            choices=choices,
            conversation=conversation,
            origin=where,
        )

    def _prompt(self, cells: dict[str, Any], conversation: Conversation | None, where: str) -> str:
        if conversation is not None:
            return conversation.transcript
        column = self._columns.prompt
        return "" if column is None else _text(cells[column], where, column)

    def _conversation(self, cells: dict[str, Any], column: str, where: str) -> Conversation:
        columns, cell = self._columns, cells[column]
        if isinstance(cell, str) and "output" in self._table.column_names:
            return alpaca(cell, cells.get("input"), cells["output"], where)
        images = None if columns.image is None else _image_cells(cells[columns.image])
        tools = None if columns.tools is None else cells[columns.tools]
        return read_conversation(cell, column, images, tools, self._folder, where)

    def _response(
        self, cells: dict[str, Any], choices: tuple[str, ...] | None, conversation: Conversation | None, where: str
    ) -> str | None:
        columns = self._columns
        if conversation is not None:
            return None if conversation.answer is None else content_text(conversation.answer)
        if columns.answer_index is None:
            return None if columns.response is None else _text(cells[columns.response], where, columns.response)
        assert choices is not None, "Columns refuses an answer_index without choices"
        return choices[_index(cells[columns.answer_index], len(choices), where, columns.answer_index)]


def check_columns(columns: Columns, present: Sequence[str], path: str, key: str) -> None:
    """Check that the data has the columns.

    Raises:
        ConfigError: one is missing.
    """
    for role, column in columns.model_dump().items():
        if column is not None and column not in present:
            raise ConfigError(
                f"{key}.columns.{role} is '{column}', but {path} has the columns {', '.join(present)}: "
                f"specify one of them, or null"
            )


def _image_cells(cell: Any) -> list[Any]:
    """The images of a conversation: those of a list of them, or a single one."""
    if cell is None:
        return []
    return cell if isinstance(cell, list) and not isinstance(next(iter(cell), None), (list, int)) else [cell]


def _text(value: Any, where: str, column: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: column '{column}' holds {value}; fix or remove the row")
    return str(value)


def _index(value: Any, count: int, where: str, column: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise DataError(
            f"{where}: column '{column}' holds {value!r}; the position of the right one among its {count} choices "
            f"is expected, a whole number from 0"
        )
    return value
