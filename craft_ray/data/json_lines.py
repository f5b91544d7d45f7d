"""JSON lines, parsed row by row on access: a table would convert what looks like a date, or an integer among fractions,
into something else."""

from __future__ import annotations

import codecs
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class JsonLines:
    """Rows of files with one JSON object per line, or a list of objects. Only the bounds of each line stay in memory;
    a row is read and parsed on access."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [_Lines(file) for file in files]
        self._rows = [(file, span) for file in self._files for span in file.spans]
        names: dict[str, None] = {}
        for file in self._files:
            for number, span in zip(file.numbers, file.spans, strict=True):
                row = _parse(file.text(span), f"{file.name}, line {number}")
                if not isinstance(row, dict):
                    raise ValueError(f"{file.name}, line {number}: a {type(row).__name__}, not an object")
                names.update(dict.fromkeys(row))
        self.column_names = list(names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: int | str) -> Any:
        """The row of that number, every column in it, or the column of that name."""
        if isinstance(key, str):
            return [self[row][key] for row in range(len(self))]
        file, span = self._rows[key]
        return dict.fromkeys(self.column_names) | json.loads(file.text(span))

    def select(self, rows: Sequence[int]) -> JsonLines:
        chosen = JsonLines(())
        chosen._rows, chosen.column_names = [self._rows[row] for row in rows], self.column_names
        return chosen


class _Lines:
    """A mapped file and the positions of its JSON objects."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        with path.open("rb") as file:
            self._data: mmap.mmap | bytes = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            )
        start = len(codecs.BOM_UTF8) if self._data[:3] == codecs.BOM_UTF8 else 0
        if self._data[start : start + 4096].lstrip().startswith(b"["):  # a list: rewritten as one object per line
            rows = _parse(self._data[start:].decode("utf-8"), self.name)
            self._data, start = "\n".join(map(json.dumps, rows)).encode(), 0
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

    def text(self, span: tuple[int, int]) -> str:
        return self._data[slice(*span)].decode("utf-8")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error.msg} at character {error.colno}") from None
