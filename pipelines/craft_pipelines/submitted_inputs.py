"""The relative paths of a submitted command, checked before anything is uploaded: the job sees the copy of the working
directory and not the directory itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from craft_pipelines.submitted import submitted
from craft_pipelines.working_dir import contents
from craft_ray.config import load_config
from craft_ray.config.paths import matching
from craft_ray.errors import ConfigError

WRITTEN = "output_dir"
"""Written and not read, and only by some commands, which refuse a folder of the copy themselves."""


def check_inputs(command: Sequence[str], folder: Path, patterns: Sequence[str]) -> None:
    """Check that the configs which a command names, and the relative paths in them, are in the copy of `folder`.

    Only commands of `craft-ray` are checked, and only configs that are named relative to `folder`: what an absolute
    path leads to on the cluster is not known here.

    Args:
        command: as in `submitted`.
        patterns: those of the files that are not copied.

    Raises:
        ConfigError: one of them is missing in the copy, or a config is invalid.
    """
    configs = [(each.config, each.overrides) for each in submitted(command) if each.config is not None]
    if not configs:
        return
    folder = _normal(folder)
    copied = {parent for path in contents(folder, patterns) for parent in (path, *path.parents)}
    for name, overrides in configs:
        path = _normal(folder / name)
        if not path.exists():
            raise ConfigError(f"the command names {name}, and {folder} has no such file: correct it, or --working-dir")
        _check(f"the command names {name}", path, folder, copied)
        for key, value in _relative_paths(path, overrides, folder):
            if key != WRITTEN:
                _check(
                    f"{key} in {name} is the relative path {os.path.relpath(value, folder)}",
                    Path(value),
                    folder,
                    copied,
                )


def _relative_paths(config: Path, overrides: Sequence[str], folder: Path) -> Iterator[tuple[str, str]]:
    """Key and absolute path of what depends on the folder that relative paths start from."""
    here, elsewhere = (
        load_config(config, overrides, base).model_dump(mode="json") for base in (folder, folder / ".elsewhere")
    )
    yield from _differences(here, elsewhere)


def _differences(here: Any, elsewhere: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(here, dict):
        for name, value in here.items():
            yield from _differences(value, elsewhere[name], f"{key}.{name}" if key else name)
    elif isinstance(here, list):
        for index, value in enumerate(here):
            yield from _differences(value, elsewhere[index], f"{key}[{index}]")
    elif here != elsewhere and "://" not in here:
        yield key, here


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path))


def _check(what: str, path: Path, folder: Path, copied: set[Path]) -> None:
    """Check that all of what a path or pattern names is in the copy."""
    remedy = "put it on storage that the cluster sees and name it by an absolute path or s3://..."
    if not path.is_relative_to(folder):
        raise ConfigError(f"{what}, outside the working directory {folder}, and only that is copied: {remedy}")
    found = matching(path)
    if not found:
        raise ConfigError(f"{what}, and there is nothing there to copy to the cluster: correct it, or {remedy}")
    for each in found:
        if each.relative_to(folder) not in copied:
            raise ConfigError(
                f"{what}, and the copy of the working directory {folder} leaves it out (.gitignore, .rayignore, caches "
                f"and outputs): {remedy}"
            )
