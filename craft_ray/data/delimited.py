"""CSV and TSV files. Every value is text, as it is written: 007 stays 007, and NA is not a missing value."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from craft_ray.config import ending
from craft_ray.data.arrow import ArrowTable, mapped
from craft_ray.data.cells import shown
from craft_ray.data.compressed import open_bytes
from craft_ray.data.derived import derived
from craft_ray.data.formats import short_names

BATCH_CHARACTERS = 4 << 20
LONGEST_FIELD = 2**31 - 1
"""Python's own limit is 128 kB, less than a long document."""


def read_csv(files: Mapping[Path, str], columns: Sequence[str], delimiter: str | None) -> ArrowTable:
    """The rows of files with their checksums (RFC 4180: a header, quotes doubled, newlines within quotes).

    Raises:
        ValueError: a file is not UTF-8, a row has more or fewer values than the header, or a quote is wrong; the
            message names the file, the row and the line that it begins on.
    """
    parts: list[tuple[str, pa.Table]] = []
    names: dict[str, None] = {}
    for file, short in short_names(files).items():
        character = delimiter or ("\t" if ending(file) == ".tsv" else ",")
        header = next(_lines(file, short, character), (0, []))[1]
        twice = [name for name in columns if header.count(name) > 1]
        if twice:
            raise ValueError(f"{short}: its header has {shown(twice[0])} twice; rename one")
        names |= dict.fromkeys(header)
        present = [name for name in columns if name in header] or header[:1]
        write = partial(_write, file, short, character, present)
        parts.append((short, mapped(derived(files[file], ["csv", character, present], write))))
    return ArrowTable(parts, list(names))


def _write(file: Path, short: str, delimiter: str, columns: list[str], target: Path) -> None:
    lines = _lines(file, short, delimiter)
    _, header = next(lines, (0, []))
    at = [header.index(name) for name in columns]
    schema = pa.schema([pa.field(name, pa.large_string()) for name in columns])
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        rows: list[list[str]] = []
        size = 0

        def flush() -> None:
            cells = [pa.array([row[place] for row in rows], pa.large_string()) for place in range(len(at))]
            writer.write_batch(pa.record_batch(cells, schema=schema))

        for number, (begins, line) in enumerate(lines):
            if len(line) != len(header):
                raise ValueError(
                    f"{short}, {_place(number, begins)}: {len(line)} values, but the header has {len(header)}; quote "
                    f"a value that holds a delimiter or a newline"
                )
            rows.append([line[place] for place in at])
            size += sum(map(len, rows[-1])) + 1
            if size > BATCH_CHARACTERS:
                flush()
                rows, size = [], 0
        flush()


def _lines(file: Path, short: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The header and each row, with the number of the line that it begins on; empty lines are skipped."""
    limit = csv.field_size_limit(LONGEST_FIELD)
    with open_bytes(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        number, begins = -1, 1
        try:
            for row in reader:
                if row:
                    yield begins, row
                    number += 1
                begins = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{short}, {_place(number, begins)}: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{short}, after line {reader.line_num}: it is not UTF-8; save it as that") from None
        finally:
            csv.field_size_limit(limit)


def _place(number: int, line: int) -> str:
    """A row by its number, as everywhere, and by the line that it begins on, for an editor."""
    return f"row {number} (line {line})" if number >= 0 else f"its header (line {line})"
