"""Samples from JSON lines, Parquet, Hugging Face datasets and plain text, all behind one random-access view.

Tables are read by Hugging Face datasets and memory-mapped; JSON lines are parsed row by row as they are asked for,
because a table would turn what looks like a date, or a number among fractions, into something else.
"""

from __future__ import annotations

import codecs
import glob
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow.parquet as pq
from blake3 import blake3

from craft_ray.config import Columns, DataConfig
from craft_ray.data.ids import CHUNK, Ids
from craft_ray.data.images import encoded_image
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError, first_line
from craft_ray.extras import require_lerobot
from craft_ray.storage.files import checksum
from craft_ray.storage.node_cache import at_hand
from craft_ray.storage.paths import ObjectPath, StoragePath, is_object

ENDINGS = {
    ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text", ".py": "text",
    ".rst": "text",
}  # fmt: skip
SAVED_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files by which a folder that datasets' `save_to_disk` wrote is known."""


LEROBOT_MARK = "meta/info.json"
"""By which the folder of a LeRobotDataset is known."""


class Source(Protocol):
    """Samples by row number. Open one with `open_source`."""

    name: str
    has_responses: bool
    """Whether a sample comes with what the model shall answer."""

    @property
    def features(self) -> Mapping[str, tuple[int, ...]] | None:
        """What a robot's frames hold, with its shape (of pictures: channels, height, width); None for other samples."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the content and of how it is read."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...

    def ids(self) -> Sequence[str]:
        """The ids of all rows, in order; a part of them is a list.

        Raises:
            DataError: two rows have the same id.
        """
        ...


class TableSource:
    """The rows of a table."""

    features = None

    def __init__(
        self, table: datasets.Dataset | JsonLines, config: DataConfig, folder: StoragePath, content: str
    ) -> None:
        self._table = table
        self._columns = config.columns
        self._folder = folder
        self._content = content
        self.name = config.path
        self.has_responses = config.columns.response is not None or config.columns.answer_index is not None

    @cached_property
    def fingerprint(self) -> str:
        """Where an image lies is no part of it, what is in it is."""
        digest = blake3(self._content.encode())
        if self._columns.image is not None:
            for row, cell in enumerate(self._table[self._columns.image]):
                if isinstance(cell, dict) and not cell.get("bytes"):
                    cell = cell.get("path")
                if isinstance(cell, str):
                    digest.update(encoded_image(cell, self._folder, f"{self.name}, row {row}"))
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Sample:
        return self._sample(row, self._table[row])

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def ids(self) -> Ids:
        ids = Ids(self._each_id())
        if ids.double is not None:
            raise DataError(f"{self.name}: id '{ids.double}' stands in more than one row; ids must be unique")
        return ids

    def _each_id(self) -> Iterator[str]:
        column = self._columns.id
        if column is None:
            yield from (f"{row:08d}" for row in range(len(self)))
            return
        cells = self._table[column]
        for start in range(0, len(self), CHUNK):  # one by one they take ten times as long
            for row, value in enumerate(cells[start : start + CHUNK], start):
                yield _text(value, f"{self.name}, row {row}", column)

    def _sample(self, row: int, cells: dict[str, Any]) -> Sample:
        columns = self._columns
        where = f"{self.name}, row {row}"
        image = choices = None
        if columns.image is not None:
            image = encoded_image(cells[columns.image], self._folder, where)
        if columns.choices is not None:
            options = cells[columns.choices]
            if not isinstance(options, list):
                raise DataError(f"{where}: column '{columns.choices}' holds {options!r}; a list of answers is expected")
            choices = tuple(_text(option, where, columns.choices) for option in options)
        return Sample(
            id=f"{row:08d}" if columns.id is None else _text(cells[columns.id], where, columns.id),
            prompt="" if columns.prompt is None else _text(cells[columns.prompt], where, columns.prompt),
            image=image,
            response=self._response(cells, choices, where),
            choices=choices,
        )

    def _response(self, cells: dict[str, Any], choices: tuple[str, ...] | None, where: str) -> str | None:
        columns = self._columns
        if columns.answer_index is None:
            return None if columns.response is None else _text(cells[columns.response], where, columns.response)
        assert choices is not None, "Columns refuses an answer_index without choices"
        return choices[_index(cells[columns.answer_index], len(choices), where, columns.answer_index)]


def open_source(config: DataConfig, key: str) -> Source:
    """The samples that a section of the configuration names.

    Args:
        key: the section's place in the configuration, for errors (`task`, `anchors.source`).

    Raises:
        ConfigError: nothing is there, it is of another format, or a named column is missing.
        DataError: it holds no row.
    """
    named, config = config.path, config.model_copy(update={"path": at_hand(config.path, f"{key}.path")})
    if config.format == "lerobot" or (config.format == "auto" and (Path(config.path) / LEROBOT_MARK).exists()):
        require_lerobot(f"{key} is a LeRobotDataset")
        from craft_ray.lerobot.dataset import open_lerobot

        recorded = open_lerobot(config, key)
        recorded.name = named
        return recorded
    for name, used in (("episodes", config.episodes), ("stride", config.stride > 1), ("rename", config.rename)):
        if used:
            raise ConfigError(f"{key}.{name} is for a LeRobotDataset, but {config.path} is none: leave it out")
    files, kind = _files(config, key)
    digest = blake3()
    for file in files:
        digest.update(bytes.fromhex(checksum(file)))
    try:
        table = _read(config, files, kind, digest.hexdigest())
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise ConfigError(
            f"{key}: {config.path} does not read as {kind} ({first_line(error.__cause__ or error)})"
        ) from None
    if not len(table):
        raise DataError(f"{key}: {config.path} holds no sample; name data with at least one row")
    _check_columns(config.columns, table.column_names, config, key)
    if config.limit is not None:
        table = table.select(range(min(config.limit, len(table))))
    if not files:  # a hub data set: the library's own hash knows its revision
        assert isinstance(table, datasets.Dataset)
        digest.update(table._fingerprint.encode())
    # A key that is not used leaves the hash as it was before there was such a key: caches and runs go by it.
    unused = None if config.columns.answer_index else {"columns": {"answer_index"}}
    how = config.model_dump_json(include={"split", "revision", "columns", "limit", "chunk_chars"}, exclude=unused)
    digest.update(f"{kind}{how}".encode())
    source = TableSource(table, config, _folder(named, files), digest.hexdigest())
    source.name = named
    return source


def _files(config: DataConfig, key: str) -> tuple[list[Path], str]:
    """The files behind a source, sorted by name, and its format. A hub name has none."""
    path = Path(config.path)
    found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(config.path) if Path(p).is_file())
    kind = config.format
    if kind == "auto":
        kind = ENDINGS.get(found[0].suffix, "dataset") if found else "dataset"  # type: ignore[assignment]
    if path.is_dir() and config.format == "auto":
        # A folder of files of one kind is read as that kind.
        kinds = {ENDINGS.get(file.suffix) for file in path.iterdir() if file.is_file()}
        if any((path / mark).exists() for mark in SAVED_MARKS):
            kinds.add("dataset")
        kind = kinds.pop() or "dataset" if len(kinds) == 1 else "dataset"  # type: ignore[assignment]
    if path.is_dir():
        pattern = {"jsonl": "*.json*", "parquet": "*.parquet", "text": "*"}.get(kind, "**/*")
        found = sorted(p for p in path.glob(pattern) if p.is_file())
    looks_local = config.path.startswith(("/", ".", "~")) or path.suffix in ENDINGS
    if not found and (kind != "dataset" or looks_local):
        raise ConfigError(f"{key}: there is no data at {config.path}: name a file, a folder or a hub data set")
    return found, kind


def _folder(named: str, files: Sequence[Path]) -> StoragePath:
    """Where relative paths of images start: the folder that was named, or the one the files are in."""
    if is_object(named):
        return ObjectPath(named) if ObjectPath(named).is_dir() else ObjectPath(named).parent
    if Path(named).is_dir():
        return Path(named)
    return Path(os.path.commonpath([file.parent for file in files])) if files else Path.cwd()


def _read(config: DataConfig, files: Sequence[Path], kind: str, content: str) -> datasets.Dataset | JsonLines:
    """The rows of files with the hash `content`."""
    if kind == "jsonl":
        return JsonLines(files)
    if kind == "text":
        return _read_text(files, config.chunk_chars)
    # The library knows a file by its path and time, and would serve an old copy of one that was soon rewritten.
    cache = os.path.join(datasets.config.HF_DATASETS_CACHE, "craft-ray", content[:32]) if files else None
    if kind == "parquet":
        files = [file for file in files if pq.read_metadata(file).num_rows]
        if not files:
            return datasets.Dataset.from_dict({})
        names = [str(file) for file in files]
        return _undecoded(datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=cache))
    loaded = _load_folder(config.path)
    if loaded is None:
        loaded = datasets.load_dataset(config.path, split=config.split, revision=config.revision, cache_dir=cache)
    elif isinstance(loaded, datasets.DatasetDict):
        if config.split not in loaded:
            raise ValueError(f"it has no split '{config.split}', only {', '.join(loaded)}")
        loaded = loaded[config.split]
    return _undecoded(loaded)


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """The same table, its images as the encoded bytes that they are stored as."""
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _read_text(files: Sequence[Path], size: int) -> datasets.Dataset:
    """Chunks of `size` characters; none runs across the end of a file."""
    texts = [file.read_text(encoding="utf-8") for file in files]
    chunks = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    return datasets.Dataset.from_dict({"text": chunks})


class JsonLines:
    """Rows of files with one JSON object a line, or a list of objects. Only where each line starts is kept in memory;
    a row is read and parsed when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [_Lines(file) for file in files]
        self._places = [(file, span) for file in self._files for span in file.spans]
        names: dict[str, None] = {}
        for file in self._files:
            for number, span in zip(file.numbers, file.spans, strict=True):
                row = _parse(file.text(span), f"{file.name}, line {number}")
                if not isinstance(row, dict):
                    raise ValueError(f"{file.name}, line {number}: a {type(row).__name__}, not an object")
                names.update(dict.fromkeys(row))
        self.column_names = list(names)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: int | str) -> Any:
        """The row of that number, every column in it, or the column of that name."""
        if isinstance(key, str):
            return [self[row][key] for row in range(len(self))]
        file, span = self._places[key]
        return dict.fromkeys(self.column_names) | json.loads(file.text(span))

    def select(self, rows: Sequence[int]) -> JsonLines:
        chosen = JsonLines(())
        chosen._places, chosen.column_names = [self._places[row] for row in rows], self.column_names
        return chosen


class _Lines:
    """A mapped file and where its JSON objects stand."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        with path.open("rb") as file:
            self._data: mmap.mmap | bytes = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            )
        start = len(codecs.BOM_UTF8) if self._data[:3] == codecs.BOM_UTF8 else 0
        if self._data[start : start + 4096].lstrip().startswith(b"["):  # a list: written out a line each
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


def _load_folder(path: str) -> datasets.Dataset | datasets.DatasetDict | None:
    """A folder that `save_to_disk` wrote; None for one of data files, which `load_dataset` understands."""
    if not any((Path(path) / mark).exists() for mark in SAVED_MARKS):
        return None
    return datasets.load_from_disk(path)


def _check_columns(columns: Columns, present: Sequence[str], config: DataConfig, key: str) -> None:
    for role, column in columns.model_dump().items():
        if column is not None and column not in present:
            raise ConfigError(
                f"{key}.columns.{role} is '{column}', but {config.path} has the columns {', '.join(present)}: "
                f"name one of them, or null"
            )


def _text(value: Any, where: str, column: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: column '{column}' holds {value}; mend or remove the row")
    return str(value)


def _index(value: Any, count: int, where: str, column: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise DataError(
            f"{where}: column '{column}' holds {value!r}; the place of the right one among its {count} choices is "
            f"expected, a whole number from 0"
        )
    return value
