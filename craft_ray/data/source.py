"""Samples from JSON lines, Parquet, Hugging Face datasets and plain text, all behind one random-access view.

The reading itself is Hugging Face datasets': one memory-mapped table, whatever the file was.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from blake3 import blake3

from craft_ray.config import Columns, DataConfig
from craft_ray.data.images import encoded_image
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError

ENDINGS = {
    ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text", ".py": "text",
    ".rst": "text",
}  # fmt: skip


class Source:
    """Samples by row number. Open it with `open_source`."""

    def __init__(self, table: datasets.Dataset, config: DataConfig, folder: Path, fingerprint: str) -> None:
        self._table = table
        self._columns = config.columns
        self._folder = folder
        self.name = config.path
        self.fingerprint = fingerprint
        """Hash of the content and of how it is read; no path is part of it."""

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Sample:
        return self._sample(row, self._table[row])

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def ids(self) -> list[str]:
        """The ids of all rows, in order.

        Raises:
            DataError: two rows have the same id.
        """
        if self._columns.id is None:
            return [f"{row:08d}" for row in range(len(self))]
        ids = [str(value) for value in self._table[self._columns.id]]
        if len(set(ids)) != len(ids):
            seen: set[str] = set()
            double = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            raise DataError(f"{self.name}: id '{double}' stands in more than one row; ids must be unique")
        return ids

    def _sample(self, row: int, cells: dict[str, Any]) -> Sample:
        columns = self._columns
        where = f"{self.name}, row {row}"
        image = choices = None
        if columns.image is not None:
            image = encoded_image(cells[columns.image], self._folder, where)
        if columns.choices is not None:
            choices = tuple(_text(c, where, columns.choices) for c in cells[columns.choices])
        return Sample(
            id=f"{row:08d}" if columns.id is None else _text(cells[columns.id], where, columns.id),
            prompt="" if columns.prompt is None else _text(cells[columns.prompt], where, columns.prompt),
            image=image,
            response=None if columns.response is None else _text(cells[columns.response], where, columns.response),
            choices=choices,
        )


def open_source(config: DataConfig, key: str) -> Source:
    """The samples that a section of the configuration names.

    Args:
        key: the section's place in the configuration, for errors (`task`, `anchors.source`).

    Raises:
        ConfigError: nothing is there, it is of another format, or a named column is missing.
        DataError: it holds no row.
    """
    files, kind = _files(config, key)
    try:
        table = _read(config, files, kind)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigError(f"{key}: {config.path} does not read as {kind} ({reason})") from None
    _check_columns(config.columns, table.column_names, config, key)
    if config.columns.image is not None:
        table = table.cast_column(config.columns.image, datasets.Image(decode=False)) if isinstance(
            table.features[config.columns.image], datasets.Image
        ) else table
    if config.limit is not None:
        table = table.select(range(min(config.limit, len(table))))
    if not len(table):
        raise DataError(f"{key}: {config.path} holds no sample; name data with at least one row")
    digest = blake3()
    for file in files:
        digest.update_mmap(file)
    if not files:
        digest.update(table._fingerprint.encode())
    how = config.model_dump_json(include={"split", "revision", "columns", "limit", "chunk_chars"})
    digest.update(f"{kind}{how}".encode())
    folder = files[0].parent if files else Path.cwd()
    return Source(table, config, folder, digest.hexdigest()[:32])


def _files(config: DataConfig, key: str) -> tuple[list[Path], str]:
    """The files behind a source, sorted by name, and its format. A hub name has none."""
    path = Path(config.path)
    found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(config.path) if Path(p).is_file())
    kind = config.format
    if kind == "auto":
        kind = ENDINGS.get(found[0].suffix, "dataset") if found else "dataset"  # type: ignore[assignment]
    if path.is_dir():
        pattern = {"jsonl": "*.json*", "parquet": "*.parquet", "text": "*"}.get(kind, "**/*")
        found = sorted(p for p in path.glob(pattern) if p.is_file())
    looks_local = config.path.startswith(("/", ".", "~")) or path.suffix in ENDINGS
    if not found and (kind != "dataset" or looks_local):
        raise ConfigError(f"{key}: there is no data at {config.path}: name a file, a folder or a hub data set")
    return found, kind


def _read(config: DataConfig, files: Sequence[Path], kind: str) -> datasets.Dataset:
    names = [str(file) for file in files]
    if kind == "jsonl":
        return datasets.load_dataset("json", data_files=names, split="train")
    if kind == "parquet":
        return datasets.load_dataset("parquet", data_files=names, split="train")
    if kind == "text":
        size = config.chunk_chars
        chunks = []
        for file in files:
            text = file.read_text(encoding="utf-8")
            chunks += [text[start : start + size] for start in range(0, len(text), size)]
        return datasets.Dataset.from_dict({"text": chunks})
    if Path(config.path).is_dir():
        loaded = _load_folder(config.path)
        if loaded is not None:
            return loaded[config.split] if isinstance(loaded, datasets.DatasetDict) else loaded
    return datasets.load_dataset(config.path, split=config.split, revision=config.revision)


def _load_folder(path: str) -> datasets.Dataset | datasets.DatasetDict | None:
    """A folder that `save_to_disk` wrote; None for one of data files, which `load_dataset` understands."""
    marks = ("dataset_info.json", "dataset_dict.json", "state.json")
    if not any((Path(path) / mark).exists() for mark in marks):
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
