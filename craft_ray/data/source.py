"""Samples from JSON lines, CSV, Parquet, Hugging Face datasets, plain text and LeRobotDatasets, all behind one
random-access view."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
from blake3 import blake3

from craft_ray.config import (
    AutoData,
    CsvData,
    DataConfig,
    HuggingFaceData,
    JsonLinesData,
    LeRobotData,
    TableData,
    TextData,
    as_format,
    recognised,
)
from craft_ray.data.cells import cut
from craft_ray.data.delimited import read_csv
from craft_ray.data.formats import files_at, format_at, looks_local
from craft_ray.data.hugging_face import read_folder, read_hub
from craft_ray.data.json_lines import JsonLines
from craft_ray.data.parquet import read_parquet
from craft_ray.data.place import Place
from craft_ray.data.sample import Sample
from craft_ray.data.splits import TRAIN, Split, files_of_split
from craft_ray.data.streaming import StreamedSource, open_stream
from craft_ray.data.table import Table, TableSource, check_columns, named_columns, text_columns
from craft_ray.data.text import read_text
from craft_ray.errors import ConfigError, DataError, first_line
from craft_ray.extras import require_lerobot
from craft_ray.storage.files import checksum
from craft_ray.storage.node_cache import local_copy
from craft_ray.storage.paths import ObjectPath, StoragePath, is_object


class Source(Protocol):
    """Samples by row number. Open one with `open_source`."""

    name: str
    has_responses: bool
    """Whether a sample has a response for the model to give."""
    has_choices: bool
    """Whether it has answers to choose from."""
    has_conversations: bool
    """Whether its samples are conversations."""

    @property
    def has_image_lists(self) -> bool:
        """Whether a sample has any number of images, and not one."""
        ...

    @property
    def features(self) -> Mapping[str, tuple[int, ...]] | None:
        """Names and shapes of a robot's features (images: channels, height, width); None for other samples."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the content and of how it is read."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]: ...

    def place(self, row: int) -> Place:
        """Where a row is, for messages."""
        ...

    def ids(self) -> Sequence[str]:
        """The ids of all rows, in order; a slice is a list.

        Raises:
            DataError: two rows have the same id.
        """
        ...


def open_source(config: DataConfig, key: str) -> Source:
    """The samples of a data section of the configuration.

    Args:
        key: the section's key in the configuration, for errors (`task`, `anchors.source`).

    Raises:
        ConfigError: there is nothing, it has another format, or a named column is missing.
        DataError: it holds no row.
    """
    if isinstance(config, HuggingFaceData) and config.streaming:
        raise ConfigError(
            f"{key}.streaming is true, but only one source of task data is streamed: anchors, held-out data and the "
            f"sources of a mixture are read by row number; leave it out"
        )
    named, config = config.path, _resolved(config, key)
    if isinstance(config, LeRobotData):
        require_lerobot(f"{key} is a LeRobotDataset")
        from craft_ray.lerobot.dataset import open_lerobot

        recorded = open_lerobot(config, key)
        recorded.name = named
        return recorded
    return _open_table(config, named, key)


def open_streamed(config: HuggingFaceData, key: str) -> StreamedSource:
    """The samples of a data set that is not stored.

    Raises:
        ConfigError: there is nothing, the library would convert its values, or a named column is missing.
    """
    if is_object(config.path):
        raise ConfigError(f"{key}.streaming is of data sets on the hub, and {config.path} is in an object store")
    folder = Path(config.path) if Path(config.path).is_dir() else Path.cwd()
    with _readable(config, "dataset", key):
        return open_stream(config, folder, key)


def first_rows(config: DataConfig, key: str, count: int) -> tuple[list[str], list[dict[str, Any]]] | None:
    """The names of all columns and the first rows with all of them, for those who do not know yet which to name; None
    for a LeRobotDataset, which has none.

    Raises:
        ConfigError, DataError: as `open_source` does.
    """
    named, config = config.path, _resolved(config, key)
    if isinstance(config, LeRobotData):
        return None
    kind = config.tags[0]
    files, content = _files(config, kind, named, key)
    with _readable(config, kind, key):
        names = _read(config, files, content, []).column_names
        table = _read(config, files, content, names)
        return names, [table.row(number) for number in range(min(count, len(table)))]


def _resolved(config: DataConfig, key: str) -> DataConfig:
    """A section with a local path and the format that is found there."""
    named, config = config.path, config.model_copy(update={"path": local_copy(config.path, f"{key}.path")})
    if config.format == "auto":
        otherwise = "dataset" if isinstance(config, AutoData) else config.tags[0]
        try:
            found = format_at(config.path)
        except ValueError as error:
            raise ConfigError(f"{key}: {named}: {error}: narrow the pattern, or set {key}.format") from None
        config = as_format(config, found or otherwise, key)
    return config


def _open_table(config: TableData, named: str, key: str) -> TableSource:
    """The samples of a table.

    Args:
        named: path of the data in the config; a copy of them may be read.
    """
    kind = config.tags[0]
    files, content = _files(config, kind, named, key)
    with _readable(config, kind, key):
        table = _read(config, files, content, named_columns(config.columns))
        columns = recognised(config.columns, table.column_names)
        if columns != config.columns:
            config = config.model_copy(update={"columns": columns})
            table = _read(config, files, content, named_columns(columns))
    if not len(table):
        raise DataError(f"{key}: {config.path} holds no sample; specify data with at least one row")
    check_columns(config.columns, table.column_names, config.path, key)
    if config.limit is not None:
        table = table.part(0, min(config.limit, len(table)))
    classes = {name: table.classes[name] for name in text_columns(config.columns) if name in table.classes}
    digest = _hash_of(files)
    digest.update(f"{table.identity}{classes or ''}".encode())
    digest.update(f"{kind}{_reading_settings(config)}".encode())
    return TableSource(named, table, config.columns, _folder(named, list(files)), digest.hexdigest())


@contextmanager
def _readable(config: TableData, kind: str, key: str) -> Iterator[None]:
    """Turns the errors of libraries that read a table into one line."""
    try:
        yield
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError, OSError) as error:
        reason = cut(first_line(error.__cause__ or error))
        raise ConfigError(f"{key}: {config.path} does not read as {kind} ({reason})") from None


def _hash_of(files: Mapping[Path, str]) -> Any:
    digest = blake3()
    for content in files.values():
        digest.update(bytes.fromhex(content))
    return digest


def _files(config: TableData, kind: str, named: str, key: str) -> tuple[dict[Path, str], str]:
    """The files of a source with their checksums, and the hash of all; no files for a data set on the hub."""
    files = files_at(config.path, kind)
    if not files and (kind != "dataset" or looks_local(config.path)):
        raise ConfigError(f"{key}: there is no data at {config.path}: specify a file, a folder or a hub data set")
    split = Split.parse(config.split)
    if not Path(config.path).is_dir():
        if files and split.name != TRAIN:
            raise ConfigError(
                f"{key}.split is '{config.split}', but {named} names its files itself: leave split out, or write "
                f"{TRAIN}[...] for a part of their rows"
            )
        if files and kind == "dataset":
            raise ConfigError(
                f"{key}: the name of {named} ends like no format: set {key}.format to jsonl, csv, parquet or text"
            )
    elif kind != "dataset":
        try:
            files = files_of_split(files, split.name)
        except ValueError as error:
            raise ConfigError(f"{key}: {named} {error}") from None
    found = {file: checksum(file) for file in files}
    return found, _hash_of(found).hexdigest()


def _read(config: TableData, files: Mapping[Path, str], content: str, columns: Sequence[str]) -> Table:
    """The rows of files with their checksums and the hash `content` of all, by these columns."""
    if isinstance(config, HuggingFaceData):
        return read_folder(config, content, columns) if files else read_hub(config, columns)
    table: Table
    if isinstance(config, JsonLinesData):
        table = JsonLines(files, columns)
    elif isinstance(config, CsvData):
        table = read_csv(files, columns, config.delimiter)
    elif isinstance(config, TextData):
        table = read_text(list(files), config.chunk_chars)
    else:
        table = read_parquet(files, columns)
    return table.part(*Split.parse(config.split).bounds(len(table)))


def _reading_settings(config: TableData) -> str:
    """The settings by which rows are read, as text. Caches and runs are identified by its hash: so it stays as when
    every source had all of them, and an unused key leaves it as it was before that key existed."""
    unused = {name for name in ("answer_index", "messages", "tools", "skill") if getattr(config.columns, name) is None}
    how = {
        "split": config.split,
        "revision": config.revision if isinstance(config, HuggingFaceData) else None,
        "columns": config.columns.model_dump(exclude=unused),
        "limit": config.limit,
        "chunk_chars": config.chunk_chars if isinstance(config, TextData) else 512,
    }
    if isinstance(config, CsvData):
        how["delimiter"] = config.delimiter
    return json.dumps(how, ensure_ascii=False, separators=(",", ":"))


def _folder(named: str, files: Sequence[Path]) -> StoragePath:
    """The base of relative image paths: the folder in the config, or the one that holds the files."""
    if is_object(named):
        return ObjectPath(named) if ObjectPath(named).is_dir() else ObjectPath(named).parent
    if Path(named).is_dir():
        return Path(named)
    return Path(os.path.commonpath([file.parent for file in files])) if files else Path.cwd()
