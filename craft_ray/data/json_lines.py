"""JSON lines, parsed row by row on access: a table would convert what looks like a date, or an integer among fractions,
into something else."""

from __future__ import annotations

import codecs
import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from craft_ray.data.cells import WrittenFloat, shown
from craft_ray.data.compressed import expanded
from craft_ray.data.formats import short_names
from craft_ray.errors import first_line


class JsonLines:
    """Rows of files with one JSON object per line, or a list of objects. Only the bounds of each line stay in memory;
    a row is read and parsed on access."""

    classes: Mapping[str, Sequence[str]] = {}
    pads_mappings = False

    def __init__(self, files: Mapping[Path, str], columns: Sequence[str] = ()) -> None:
        """
        Args:
            files: with their checksums.
            columns: the columns that are read.

        Raises:
            ValueError: a row is not a JSON object; the message names its file and line.
        """
        self._files = [_Lines(short, expanded(file, files[file])) for file, short in short_names(files).items()]
        self._rows = [(file, row) for file in self._files for row in range(len(file.spans))]
        self._columns = columns
        self.identity = ""
        names: dict[str, None] = {}
        for file in self._files:
            for number, span in zip(file.numbers, file.spans, strict=True):
                place = f"{file.name}, line {number}"
                row = _parse(file.bytes(span), place, columns)
                if not isinstance(row, dict):
                    raise ValueError(f"{place}: a {type(row).__name__}, not an object")
                twice = _repeated(row, columns)
                if twice is not None:
                    raise ValueError(f"{place}: the key {shown(twice)} occurs twice in one object; keep one of them")
                names.update(dict.fromkeys(row))
                for column in columns:
                    cell = row.get(column)
                    if not isinstance(cell, str) and _is_reworded(cell):
                        self.identity = "numbers as they are written"
        self.column_names = list(names)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> dict[str, Any]:
        """The row of that number, with every column in it."""
        file, at = self._rows[number]
        return dict.fromkeys(self.column_names) | _loads(file.bytes(file.spans[at]), self._columns)

    def column(self, name: str) -> Iterator[Any]:
        return (self.row(number)[name] for number in range(len(self)))

    def part(self, start: int, stop: int) -> JsonLines:
        chosen = copy(self)
        chosen._rows = self._rows[start:stop]
        return chosen

    def place(self, number: int) -> tuple[str | None, int]:
        file, at = self._rows[number]
        return file.name if len(self._files) > 1 else None, at


class _Lines:
    """A mapped file and the positions of its JSON objects."""

    def __init__(self, name: str, path: Path) -> None:
        """
        Args:
            name: of the user's file; `path` is that file, or what it expands to.
        """
        self.name = name
        with path.open("rb") as file:
            self._data: mmap.mmap | bytes = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            )
        start = len(codecs.BOM_UTF8) if self._data[:3] == codecs.BOM_UTF8 else 0
        if self._data[start : start + 4096].lstrip().startswith(b"["):  # a list: rewritten as one object per line
            rows = self._data[start:]
            _parse(rows, self.name, ())
            self._data, start = "\n".join(_members(rows.decode("utf-8"))).encode(), 0
        self.spans: list[tuple[int, int]] = []
        self.numbers: list[int] = []
        number = 0
        while start < len(self._data):
            end = self._data.find(b"\n", start)
            end = len(self._data) if end < 0 else end
            number += 1
            if self._data[start:end].strip():
                self.spans.append((start, end))
                self.numbers.append(number)
            start = end + 1

    def bytes(self, span: tuple[int, int]) -> bytes:
        return self._data[slice(*span)]


def _members(text: str) -> Iterator[str]:
    """The members of a valid JSON list, each in its own characters on one line."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    while (at := _behind_space(text, at)) < len(text) and text[at] != "]":
        _, end = decoder.raw_decode(text, at)
        yield text[at:end].replace("\r", " ").replace("\n", " ")  # neither occurs in a string of valid JSON
        at = _behind_space(text, end)
        at += text[at] == ","


def _behind_space(text: str, at: int) -> int:
    while text[at : at + 1] in " \t\r\n" and at < len(text):
        at += 1
    return at


class _Repeating(dict[str, Any]):
    """An object in which a key occurs twice."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    repeating, seen = _Repeating(value), set[str]()
    repeating.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return repeating


def _repeated(row: dict[str, Any], columns: Sequence[str]) -> str | None:
    """A key that occurs twice in what is read of a row: JSON leaves open which value counts."""
    if isinstance(row, _Repeating) and row.key in columns:
        return row.key
    left = [row[column] for column in columns if column in row]
    while left:
        value = left.pop()
        if isinstance(value, _Repeating):
            return value.key
        if isinstance(value, dict | list):
            left.extend(value.values() if isinstance(value, dict) else value)
    return None


def _parse(data: bytes, where: str, columns: Sequence[str]) -> Any:
    try:
        return _loads(data, columns, _object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error.msg} at character {error.colno}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{where}: it is not UTF-8; save it as that") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets of thousands of levels
        raise ValueError(f"{where}: {first_line(error)}") from None


def _loads(data: bytes, columns: Sequence[str], of_pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value in `data`; of an object, the fractions with their text if a column is one.

    Args:
        of_pairs: makes the objects.
    """
    text = data.decode("utf-8")
    value = json.loads(text, object_pairs_hook=of_pairs)
    if isinstance(value, dict):
        for column in columns:
            cell = value.get(column)
            if not isinstance(cell, str) and _holds_fraction(cell):
                return json.loads(text, parse_float=WrittenFloat, object_pairs_hook=of_pairs)
    return value


def _holds_fraction(cell: Any) -> bool:
    """Whether a cell is a fraction, or has one at any depth."""
    if isinstance(cell, dict | list):
        return any(map(_holds_fraction, cell.values() if isinstance(cell, dict) else cell))
    return isinstance(cell, float)


def _fractions(cell: Any) -> list[float]:
    """The fractions that a cell is, or that its list holds."""
    return [value for value in (cell if isinstance(cell, list) else [cell]) if isinstance(value, float)]


def _is_reworded(cell: Any) -> bool:
    """Whether the shortest digits of a fraction, which a cell was formerly read as, are not those in the file."""
    return any(isinstance(value, WrittenFloat) and repr(float(value)) != value.written for value in _fractions(cell))
