"""What is at a path: its format, and its files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from craft_ray.config import ENDINGS, ending, matching

SAVED_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that identify a folder written by datasets' `save_to_disk`."""
LEROBOT_MARK = "meta/info.json"
"""The file that identifies the folder of a LeRobotDataset."""


def format_at(path: str) -> str | None:
    """The format of what is at a path; None if nothing is, and the path may be a name on the hub.

    Raises:
        ValueError: the files of a pattern have several formats.
    """
    folder = Path(path)
    if (folder / LEROBOT_MARK).exists():
        return "lerobot"
    if not folder.is_dir():
        found = _named_files(path)
        kinds = _formats(found)
        if len(kinds) > 1:
            raise ValueError(f"{found[0].name} and others that match it have different formats")
        return (kinds.pop() or "dataset") if kinds else None
    # A folder of files of one kind is read as that kind.
    kinds = _formats(file for file in folder.iterdir() if file.is_file())
    if any((folder / mark).exists() for mark in SAVED_MARKS):
        kinds.add("dataset")
    if kinds == {"text"} and _holds_rows(folder):
        return "dataset"  # what is above the rows is documentation
    return kinds.pop() or "dataset" if len(kinds) == 1 else "dataset"


def files_at(path: str, kind: str) -> list[Path]:
    """The files of a source, sorted by name. A name on the hub has none; hidden files in a folder are not data."""
    folder = Path(path)
    if not folder.is_dir():
        return _named_files(path)
    if kind == "dataset":
        return sorted(file for file in folder.glob("**/*") if file.is_file())
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return files if kind == "text" else [file for file in files if ENDINGS.get(ending(file)) == kind]


def short_names(files: Iterable[Path]) -> dict[Path, str]:
    """What distinguishes files from each other, for messages: their paths from the folder that holds all of them."""
    files = list(files)
    folder = os.path.commonpath([file.parent for file in files]) if files else ""
    return {file: os.path.relpath(file, folder) for file in files}


def looks_local(path: str) -> bool:
    """Whether a path with nothing at it cannot be a name on the hub."""
    return path.startswith(("/", ".", "~")) or ending(path) in ENDINGS


def _named_files(path: str) -> list[Path]:
    """The file of that name, or those of that pattern."""
    return [file for file in matching(path) if file.is_file()]


def _formats(files: Iterable[Path]) -> set[str | None]:
    return {ENDINGS.get(ending(file)) for file in files}


def _holds_rows(folder: Path) -> bool:
    """Whether a folder below has a file of rows."""
    below = (file for child in folder.iterdir() if child.is_dir() for file in child.rglob("*"))
    return any(ENDINGS.get(ending(file), "text") != "text" for file in below)
