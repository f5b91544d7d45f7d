"""Tables that Hugging Face datasets reads and maps into memory: Parquet files, and datasets on the hub or on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow.parquet as pq

from craft_ray.config import HuggingFaceData
from craft_ray.data.formats import SAVED_MARKS


def read_parquet(files: Sequence[Path], content: str) -> datasets.Dataset:
    """The rows of files with the hash `content`."""
    files = [file for file in files if pq.read_metadata(file).num_rows]
    if not files:
        return datasets.Dataset.from_dict({})
    names = [str(file) for file in files]
    return _undecoded(datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=_cache(content)))


def read_dataset(config: HuggingFaceData, content: str | None) -> datasets.Dataset:
    """The rows of a split.

    Args:
        content: hash of the files at the path; None for a name on the hub.
    """
    loaded = _load_folder(config.path)
    if loaded is None:
        cache = None if content is None else _cache(content)
        loaded = datasets.load_dataset(config.path, split=config.split, revision=config.revision, cache_dir=cache)
    elif isinstance(loaded, datasets.DatasetDict):
        if config.split not in loaded:
            raise ValueError(f"it has no split '{config.split}', only {', '.join(loaded)}")
        loaded = loaded[config.split]
    return _undecoded(loaded)


def _cache(content: str) -> str:
    """The library identifies a file by path and time, and would return an old copy of one that was soon rewritten."""
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "craft-ray", content[:32])


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """The same table, with its images as the encoded bytes that are stored."""
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _load_folder(path: str) -> datasets.Dataset | datasets.DatasetDict | None:
    """A folder that `save_to_disk` wrote; None for a folder of data files, which `load_dataset` reads."""
    if not any((Path(path) / mark).exists() for mark in SAVED_MARKS):
        return None
    return datasets.load_from_disk(path)
