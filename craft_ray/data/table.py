"""Rows with columns, as samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from blake3 import blake3

from craft_ray.config import INSTRUCTION, Columns
from craft_ray.data.cells import cut, index_of, shown, text_of, without_nulls
from craft_ray.data.conversation import Conversation, alpaca, content_text, image_paths, read_conversation
from craft_ray.data.ids import Ids
from craft_ray.data.images import encoded_image, images_in, images_of_row, is_list_of_images
from craft_ray.data.place import Place
from craft_ray.data.references import candidates, column_of, filled, value_at, within
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError, first_line
from craft_ray.storage.paths import StoragePath


class Table(Protocol):
    """Rows by number, and columns by name: JSON lines, or a table in Arrow's layout."""

    column_names: list[str]
    """The names of all columns, including those that the config does not name."""
    classes: Mapping[str, Sequence[str]]
    """The names that integers stand for, by the reference to them."""
    identity: str
    """What decides the rows in addition to the content of the files."""
    pads_mappings: bool
    """Whether every mapping of a column has the keys of all of them, as Arrow's structs do: a key that holds nothing
    may then be absent."""

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
        self.has_conversations = columns.messages is not None
        self.has_responses = bool(columns.response or columns.answer_index or columns.messages)
        self.has_choices = columns.choices is not None

    @cached_property
    def fingerprint(self) -> str:
        """It includes the content of images, not their paths."""
        digest = blake3(self._content.encode())
        for name in self._columns.images:
            for row, cell in enumerate(self._table.column(name)):
                for image in images_in(cell):
                    if isinstance(image, dict) and not image.get("bytes"):
                        image = image.get("path")
                    if isinstance(image, str):
                        digest.update(encoded_image(image, self._folder, str(self.place(row))))
        if self._columns.messages is not None:
            for row, cell in enumerate(self._table.column(self._columns.messages)):
                for path in image_paths(cell):
                    digest.update(encoded_image(path, self._folder, str(self.place(row))))
        return digest.hexdigest()[:32]

    @cached_property
    def has_image_lists(self) -> bool:
        """Whether a sample has a list of images: several columns are named, or the first cell of the column that is not
        empty holds one."""
        names = self._columns.images
        if self.has_conversations or len(names) != 1:
            return bool(names) and not self.has_conversations
        return self._holds_lists(names[0])

    def _holds_lists(self, column: str) -> bool:
        cells = (self._table.row(row).get(column) for row in range(len(self)))
        return is_list_of_images(next((cell for cell in cells if cell is not None), None))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Sample:
        try:
            cells = self._table.row(row)
        except (ValueError, OverflowError) as error:  # a string that is not UTF-8, a time outside Python's years
            raise DataError(
                f"{self.place(row)}: it does not read ({cut(first_line(error))}); fix or remove the row"
            ) from None
        return self._sample(cells, str(self.place(row)), f"{row:08d}")

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
                yield value if plain else self._text(value, column, str(self.place(row)))
        except (ValueError, OverflowError) as error:
            raise DataError(f"{self.name}: column '{column}' does not read ({cut(first_line(error))})") from None

    def place(self, row: int) -> Place:
        file, number = self._table.place(row)
        return Place(self.name if file is None else f"{self.name}: {file}", f"row {number}")

    def _text(self, value: Any, column: str, where: str) -> str:
        return text_of(value, where, column, self._classes)

    def _sample(self, cells: dict[str, Any], where: str, number: str) -> Sample:
        columns = self._columns

        def text(reference: str) -> str:
            names = within(reference, self._table.column_names)
            found = {name: self._text(self._value(cells, name, where), name, where) for name in names}
            return found[reference] if reference in found else filled(reference, found)

        conversation = None if columns.messages is None else self._conversation(cells, columns.messages, where)
        prompt = "" if columns.prompt is None else text(columns.prompt)
        choices = None
        pictures = self._pictures(cells, where) if conversation is None else conversation.images
        if columns.choices is not None:
            options = self._value(cells, columns.choices, where)
            if not isinstance(options, list):
                raise DataError(
                    f"{where}: column '{columns.choices}' holds {shown(options)}; a list of answers is expected"
                )
            choices = tuple(self._text(option, columns.choices, where) for option in options)
        response = None if columns.response is None else text(columns.response)
        if columns.answer_index is not None:
            assert choices is not None, "Columns refuses an answer_index without choices"
            index = self._value(cells, columns.answer_index, where)
            position = index_of(index, len(choices), where, columns.answer_index)
            response = choices[position]
        if conversation is not None:
            prompt = conversation.transcript
            response = None if conversation.answer is None else content_text(conversation.answer)
        id_ = number if columns.id is None else text(columns.id)
        return Sample(
            id=id_,
            prompt=prompt,
            image=next(iter(pictures), None),
            response=response,
            choices=choices,
            conversation=conversation,
            images=pictures if self.has_image_lists else None,
            skill=None if columns.skill is None else text(columns.skill),
            origin=where if columns.id is None else f"{where} (id {cut(id_)})",
        )

    def _value(self, cells: dict[str, Any], reference: str, where: str) -> Any:
        try:
            return value_at(cells, reference)
        except KeyError as error:
            part, column = error.args[0], column_of(reference, cells)
            raise DataError(
                f"{where}: column '{column}' holds {shown(cells.get(column))}, which has no '{part}', and "
                f"'{reference}' asks for it: fix or remove the row"
            ) from None

    def _pictures(self, cells: dict[str, Any], where: str) -> tuple[bytes, ...]:
        """The images of a row that is not a conversation: one, unless the source has lists of them."""
        columns = self._columns.images
        if self.has_image_lists:
            if len(columns) == 1 and cells.get(columns[0]) is None:
                raise DataError(
                    f"{where}: column '{columns[0]}' holds nothing; a list of images is expected, an empty one where a "
                    f"row has none"
                )
            values = images_of_row(cells, columns, where)
        else:
            values = [cells.get(name) for name in columns]
            if any(map(is_list_of_images, values)):
                raise DataError(
                    f"{where}: column '{columns[0]}' holds a list of images, but a single image in earlier rows: write "
                    f"a list in every row"
                )
        return tuple(encoded_image(value, self._folder, where) for value in values)

    def _conversation(self, cells: dict[str, Any], column: str, where: str) -> Conversation:
        columns, cell, system = self._columns, cells.get(column), cells.get(SYSTEM)
        if column == INSTRUCTION and isinstance(cell, str):
            return alpaca(cell, cells.get("input"), cells.get("output"), where, system)
        images = images_of_row(cells, columns.images, where) if columns.images else None
        tools = None if columns.tools is None else cells.get(columns.tools)
        if self._table.pads_mappings:
            cell, tools = without_nulls(cell), without_nulls(tools)
        return read_conversation(cell, column, images, tools, self._folder, where, system)


SYSTEM = "system"
"""The column that holds the system turn of a conversation."""
COMPOSED = ("prompt", "response", "choices", "answer_index", "skill")
"""What may be a value within a column; texts may also be put together from several. The others are columns."""


def named_columns(columns: Columns) -> list[str]:
    """The columns that are read."""
    more = [] if columns.messages is None else [SYSTEM]
    more += ["input", "output"] if columns.messages == INSTRUCTION else []
    named = [name for _, name in _roles(columns)]
    return list(dict.fromkeys(column for name in (*named, *more) for column in candidates(name)))


def text_columns(columns: Columns) -> list[str]:
    """The columns, and the references within them, whose values become text."""
    named = (columns.id, columns.prompt, columns.response, columns.choices, columns.skill)
    return list(dict.fromkeys(name for reference in filter(None, named) for name in candidates(reference)))


def check_columns(columns: Columns, present: Sequence[str], path: str, key: str) -> None:
    """Check that the data has the columns.

    Raises:
        ConfigError: one is missing.
    """
    for role, reference in _roles(columns):
        if reference in present:
            continue
        try:
            names = within(reference, present) if role in COMPOSED else [reference]
        except ValueError as error:
            raise ConfigError(
                f"{key}.columns.{role} is '{cut(reference)}', whose braces do not match: {error}"
            ) from None
        for name in names:
            if (column_of(name, present) if role in COMPOSED else name) not in present:
                asked = f"'{cut(reference)}'" if name == reference else f"'{cut(reference)}' with {{{name}}}"
                raise ConfigError(
                    f"{key}.columns.{role} is {asked}, but {path} has the columns {cut(', '.join(present))}: "
                    f"specify one of them, or null"
                )


def _roles(columns: Columns) -> list[tuple[str, str]]:
    """What the config names, and by which reference; images may be in several columns."""
    tree = columns.model_dump(exclude={"image"})
    named = [(role, name) for role, name in tree.items() if name is not None]
    return [*named, *(("image", name) for name in columns.images)]
