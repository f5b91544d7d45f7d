"""What can be seen of a command before it is uploaded: paths at which a job would write into its own copy of the
working directory."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from craft_ray.config import load_config
from craft_ray.errors import ConfigError
from craft_ray.storage.paths import is_object

WRITING = ("train", "compare", "sweep", "build")
"""Stages that write where their config says."""
RELATIVE = Path("/relative-to-the-job")
"""Stands for the working directory in resolved paths, which nothing else is below."""


def check_outputs(command: Sequence[str], folder: Path) -> None:
    """Refuse a `craft-ray` command whose results would be deleted with the job. A config that is not in the folder is
    left to the job.

    Args:
        command: its words, or a single command line.
        folder: the working directory that is uploaded.

    Raises:
        ConfigError: such a path is relative, or the config has a mistake.
    """
    try:
        words = shlex.split(command[0]) if len(command) == 1 else list(command)
    except ValueError as error:
        raise ConfigError(f"the command does not read as a line for the shell ({error}): {command[0]}") from None
    for joined, part in groupby(words, key=("&&", "||", ";", "|").__contains__):
        if not joined:
            _check_command(list(part), folder)


def _check_command(words: Sequence[str], folder: Path) -> None:
    """Check one of the commands of a line."""
    if "craft-ray" not in words:
        return
    words = list(words[words.index("craft-ray") + 1 :])
    out = _option(words, "--out")
    if out is not None and not Path(out).is_absolute() and not is_object(out):
        raise _lost("--out", out)
    config = next((word for word in words if word.endswith((".yaml", ".yml")) and (folder / word).is_file()), None)
    stage = next((word for word in words[:2] if word in WRITING), None)
    if config is None or stage is None:
        return
    overrides = [word for word in words[words.index(config) + 1 :] if "=" in word and not word.startswith("-")]
    experiment = load_config(folder / config, overrides, base=RELATIVE)
    written = {"craft.anchor_cache_dir": experiment.craft.anchor_cache_dir}
    if stage != "build" and out is None:
        written["output_dir"] = experiment.output_dir
    for key, path in written.items():
        if path is not None and not is_object(path) and Path(path).is_relative_to(RELATIVE):
            raise _lost(key, str(Path(path).relative_to(RELATIVE)))


def _option(words: Sequence[str], name: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _lost(key: str, path: str) -> ConfigError:
    return ConfigError(
        f"{key} is {path}, which is in the working directory that is uploaded with the job and deleted after it: use "
        f"an absolute path on storage that all nodes share, or s3://BUCKET/FOLDER"
    )
