"""Datasets on the hub or on disk. Hugging Face datasets determines which files a split has, and reads what is not
read here."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from craft_ray.config import HuggingFaceData
from craft_ray.data.arrow import ArrowTable
from craft_ray.data.classes import classes_of
from craft_ray.data.delimited import read_csv
from craft_ray.data.formats import SAVED_MARKS
from craft_ray.data.json_lines import JsonLines
from craft_ray.data.parquet import read_parquet
from craft_ray.data.splits import Split
from craft_ray.data.table import text_columns
from craft_ray.storage.files import checksum

FREE = {"name", "version", "description", "data_dir", "data_files", "sep", "delimiter"}
"""What a folder may say about its files so that they can be read here."""
WRITTEN = {"csv": "CSV", "json": "JSON"}
"""Kinds of files whose values have no types, by the library's names: it guesses them."""


def read_hub(config: HuggingFaceData, columns: Sequence[str]) -> ArrowTable | JsonLines:
    """The rows of a split of a data set on the hub. CSV and JSON files are fetched and read here; anything else
    has types of its own, and the library's hash of it includes its revision.

    Raises:
        ValueError: there is no such split, or the library would convert its values.
    """
    builder = datasets.load_dataset_builder(config.path, revision=config.revision)
    written = WRITTEN.get(builder.info.builder_name or "")
    if written is None:
        return _loaded(builder, config, columns, cache=None)
    if builder.config.data_files is None:
        raise ValueError(
            f"the hub is not reached, and what was kept of its {written} files has converted values; fetch them with "
            f"'hf download --repo-type dataset', and specify the folder"
        )
    files = {str(name): list(names) for name, names in builder.config.data_files.items()}
    fetched = datasets.DownloadManager(dataset_name=builder.dataset_name).download(files)
    builder.config.data_files = fetched
    table = _own_reading(builder, config, columns)
    assert table is not None, "CSV and JSON are read here or refused"
    # The files are nowhere else than in the identity, because a name on the hub has none.
    table.identity += json.dumps([checksum(Path(file)) for file in fetched[Split.parse(config.split).name]])
    return table


def read_folder(config: HuggingFaceData, content: str, columns: Sequence[str]) -> ArrowTable | JsonLines:
    """The rows of a split of a folder that a library wrote, or that was fetched from the hub.

    Args:
        content: hash of the files in it.
        columns: the columns that are read.

    Raises:
        ValueError: there is no such split, or the library cannot take the folder's name.
    """
    if any((Path(config.path) / mark).exists() for mark in SAVED_MARKS):
        return _saved(config, columns)
    if glob.has_magic(config.path) or "::" in config.path:
        raise ValueError("Hugging Face datasets takes [ ] * ? :: in a path for a pattern; rename the folder")
    # The library identifies a file by path and time, and would return an old copy of one that was soon rewritten.
    cache = os.path.join(datasets.config.HF_DATASETS_CACHE, "craft-ray", content[:32])
    builder = datasets.load_dataset_builder(config.path, cache_dir=cache)
    table = _own_reading(builder, config, columns)
    return _loaded(builder, config, columns, cache) if table is None else table


def _saved(config: HuggingFaceData, columns: Sequence[str]) -> ArrowTable:
    """What `save_to_disk` wrote."""
    loaded = datasets.load_from_disk(config.path)
    if isinstance(loaded, datasets.Dataset):
        return _as_table(loaded, columns)
    split = Split.parse(config.split)
    if split.name not in loaded:
        raise ValueError(f"it has no split '{split.name}', only {', '.join(loaded)}")
    table = _as_table(loaded[split.name], columns)
    return table.part(*split.bounds(len(table)))


def _own_reading(
    builder: datasets.DatasetBuilder, config: HuggingFaceData, columns: Sequence[str]
) -> ArrowTable | JsonLines | None:
    """The rows of a split in files of a kind that is read here, where no value becomes another because of what is next
    to it; None for other kinds.

    Raises:
        ValueError: there is no such split, or the library would have to read CSV or JSON files.
    """
    settings = builder.config
    if not isinstance(builder, Csv | Json | Parquet):
        return None
    changed = {field.name for field in fields(settings) if getattr(settings, field.name) != _default(field)}
    if "+" in config.split or not changed <= FREE:
        if isinstance(builder, Parquet):
            return None
        wanted = f"split '{config.split}'" if "+" in config.split else f"setting {min(changed - FREE)} of its README"
        raise ValueError(
            f"the {wanted} is read by the library alone, which converts values of {WRITTEN[builder.name]} files "
            f"(007 becomes 7); specify one split, and files that need no such setting"
        )
    split = Split.parse(config.split)
    splits = {str(name): [Path(file) for file in files] for name, files in settings.data_files.items()}
    if split.name not in splits:
        raise ValueError(f"it has no split '{split.name}', only {', '.join(splits)}")
    files = {file: checksum(file) for file in splits[split.name]}
    table: ArrowTable | JsonLines
    if isinstance(builder, Parquet):
        table = read_parquet(files, columns)
    else:
        table = JsonLines(files, columns) if isinstance(builder, Json) else read_csv(files, columns, settings.sep)
        table.identity = f"values as they are written {table.identity}"
    return table.part(*split.bounds(len(table)))


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _loaded(
    builder: datasets.DatasetBuilder, config: HuggingFaceData, columns: Sequence[str], cache: str | None
) -> ArrowTable:
    table = datasets.load_dataset(config.path, split=config.split, revision=config.revision, cache_dir=cache)
    _check_metadata(builder, config, table)
    if cache is not None:
        return _as_table(table, columns)
    for name, feature in table.features.items():  # only for the hash, which is that of earlier versions
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    if config.limit is not None:
        table = table.select(range(min(config.limit, len(table))))
    return _as_table(table, columns, table._fingerprint)


def _check_metadata(builder: datasets.DatasetBuilder, config: HuggingFaceData, table: datasets.Dataset) -> None:
    """Check that no text next to pictures in folders was converted.

    Raises:
        ValueError: a column of metadata.csv or metadata.jsonl has become numbers or dates, or lost values.
    """
    if not isinstance(builder, FolderBasedBuilder):
        return
    files = [Path(file).name for of in (builder.config.data_files or {}).values() for file in of]
    name = next((file for file in files if file in ("metadata.csv", "metadata.jsonl")), None)
    for column in text_columns(config.columns):
        feature = table.features.get(column)
        if name is None or not isinstance(feature, datasets.Value):
            continue
        if feature.dtype in ("string", "large_string"):
            if name == "metadata.csv" and table.data.column(column).null_count:
                raise ValueError(
                    f"the library takes values such as NA in column '{column}' of {name} for missing ones: name that "
                    f"file itself, with the column of its paths as columns.image"
                )
            continue
        if name == "metadata.csv" or not feature.dtype.startswith("int"):  # an integer in JSON is what it says
            raise ValueError(
                f"the library reads column '{column}' of {name} as {feature.dtype}, which converts its values (007 "
                f"becomes 7): name that file itself, with the column of its paths as columns.image"
            )


def _as_table(table: datasets.Dataset, columns: Sequence[str], identity: str = "") -> ArrowTable:
    """The same rows, as they are stored: nothing is decoded."""
    if table._indices is not None:
        table = table.flatten_indices()
    present = [name for name in columns if name in table.column_names] or table.column_names[:1]
    classes = classes_of(table.features.to_dict(), columns)
    return ArrowTable([("", table.data.table.select(present))], table.column_names, classes, identity)
