"""Parquet files, by the columns that are named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from craft_ray.data.arrow import ArrowTable, mapped
from craft_ray.data.classes import classes_of
from craft_ray.data.derived import derived
from craft_ray.data.formats import short_names
from craft_ray.errors import first_line

BATCH_BYTES = 4 << 20


def read_parquet(files: Mapping[Path, str], columns: Sequence[str]) -> ArrowTable:
    """The rows of files with their checksums. A column that is not named is not read, so it may hold anything."""
    parts: list[tuple[str, pa.Table]] = []
    names: dict[str, None] = {}
    classes: dict[str, Sequence[str]] = {}
    for file, short in short_names(files).items():
        schema = pq.read_schema(file)
        names |= dict.fromkeys(schema.names)
        present = [name for name in columns if name in schema.names] or schema.names[:1]
        classes |= classes_of(_features(schema), columns)
        # A file for each column: readers of other columns of the same data share them.
        paths = {name: derived(files[file], ["parquet", name], partial(_write, file, name)) for name in present}
        parts.append((short, pa.table({name: mapped(path).column(0) for name, path in paths.items()})))
    return ArrowTable(parts, list(names), classes)


def _write(file: Path, column: str, target: Path) -> None:
    with pq.ParquetFile(file) as parquet:
        metadata = parquet.metadata
        size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        rows = max(1, BATCH_BYTES * metadata.num_rows // max(size, 1))
        schema = pa.schema([parquet.schema_arrow.field(column)])
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _readable(parquet.iter_batches(min(rows, 10_000), columns=[column])):
                writer.write_batch(batch.select([column]))


def _readable(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except OSError as error:  # of the file that is read, not of the one that is written
        raise ValueError(first_line(error)) from None


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face datasets wrote about the columns; nothing in a file of another writer."""
    written = (schema.metadata or {}).get(b"huggingface")
    features: dict[str, Any] = json.loads(written).get("info", {}).get("features", {}) if written else {}
    return features
