"""What is at a path: its format, and its files."""

from __future__ import annotations

import glob
from pathlib import Path

from craft_ray.config import ENDINGS

SAVED_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that identify a folder written by datasets' `save_to_disk`."""
LEROBOT_MARK = "meta/info.json"
"""The file that identifies the folder of a LeRobotDataset."""


def format_at(path: str) -> str | None:
    """The format of what is at a path; None if nothing is, and the path may be a name on the hub."""
    folder = Path(path)
    if (folder / LEROBOT_MARK).exists():
        return "lerobot"
    if not folder.is_dir():
        found = _matching(path)
        return ENDINGS.get(found[0].suffix, "dataset") if found else None
    # A folder of files of one kind is read as that kind.
    kinds = {ENDINGS.get(file.suffix) for file in folder.iterdir() if file.is_file()}
    if any((folder / mark).exists() for mark in SAVED_MARKS):
        kinds.add("dataset")
    return kinds.pop() or "dataset" if len(kinds) == 1 else "dataset"


def files_at(path: str, kind: str) -> list[Path]:
    """The files of a source, sorted by name. A name on the hub has none."""
    folder = Path(path)
    if not folder.is_dir():
        return _matching(path)
    pattern = {"jsonl": "*.json*", "parquet": "*.parquet", "text": "*"}.get(kind, "**/*")
    return sorted(p for p in folder.glob(pattern) if p.is_file())


def looks_local(path: str) -> bool:
    """Whether a path with nothing at it cannot be a name on the hub."""
    return path.startswith(("/", ".", "~")) or Path(path).suffix in ENDINGS


def _matching(path: str) -> list[Path]:
    """The file of that name, or those of that pattern."""
    if Path(path).is_file():
        return [Path(path)]
    return sorted(Path(p) for p in glob.glob(path) if Path(p).is_file())
