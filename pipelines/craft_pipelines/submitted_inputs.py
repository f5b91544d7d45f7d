"""The relative paths of a submitted command, checked before anything is uploaded: the job sees the copy of the working
directory and not the directory itself."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from craft_pipelines.working_dir import contents
from craft_ray.config import load_config
from craft_ray.config.paths import matching
from craft_ray.errors import ConfigError

SEPARATORS = frozenset({"&&", "||", ";", "|", "&"})
"""Words between the commands of a line for the shell."""
CONFIGS = (".yaml", ".yml")
WRITTEN = "output_dir"
"""Written and not read, and only by some commands, which refuse a folder of the copy themselves."""


def check_paths(command: Sequence[str], folder: Path, patterns: Sequence[str]) -> None:
    """Check that the configs which a command names, and the relative paths in them, are in the copy of `folder`.

    Only commands of `craft-ray` are looked at, and only configs that are named relative to `folder`: what an absolute
    path leads to on the cluster is not known here.

    Args:
        command: its words; a single one is a line for the shell.
        patterns: of the files that are not copied.

    Raises:
        ConfigError: one of them is missing in the copy, or a config is invalid.
    """
    configs = list(_configs(command))
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


def _configs(command: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The relative config of each `craft-ray` command, with the overrides that it gets.

    After another command of the line (`cd`, a script) the working directory or its files may be different, so what
    follows it is not looked at.
    """
    words = _shell_words(command[0]) if len(command) == 1 else list(command)
    start = 0
    for end in [i for i, word in enumerate(words) if word in SEPARATORS] + [len(words)]:
        part, start = words[start:end], end + 1
        if not part or Path(part[0]).name != "craft-ray":
            return
        name = next((word for word in part if word.endswith(CONFIGS) and "=" not in word), None)
        if name is None or Path(name).is_absolute() or part[part.index(name) - 1].startswith("--"):
            continue
        following = part[part.index(name) + 1 :]
        yield name, [word for word in following if "=" in word and not word.startswith("-")]


def _shell_words(line: str) -> list[str]:
    """The words and operators of a line; none of one that needs a shell to be understood."""
    if any(character in line for character in "$`(){}<>\n"):
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # an open quote, which the shell will report
        return []


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
