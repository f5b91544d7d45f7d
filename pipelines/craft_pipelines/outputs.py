"""Where a stage may write: into a folder that can be created, and not into a job's working directory, which is deleted
after the job."""

from __future__ import annotations

import os
from pathlib import Path

from craft_ray.errors import ConfigError
from craft_ray.storage.paths import StoragePath

SPARE = 20
"""Characters that the name of a temporary file or folder has more than the one that it becomes."""
UPLOADED = f"{os.sep}runtime_resources{os.sep}working_dir_files{os.sep}"
"""Part of the path of Ray's copy of a working directory, on every node."""


def check_kept(path: StoragePath, key: str) -> None:
    """Refuse to write where nothing can be written, or into the working directory of a job.

    Args:
        key: the config key or the option that names the path.

    Raises:
        ConfigError: `path` is in that directory, below a file, in a folder that is read-only, or has too long a name.
    """
    if not isinstance(path, Path):
        return
    _check_writable(path.absolute(), key)
    if UPLOADED in os.path.abspath(path):
        raise ConfigError(
            f"{key} is {path}, in the working directory that was uploaded with this job and is deleted after it: use "
            f"an absolute path on storage that all nodes share, or s3://BUCKET/FOLDER"
        )


def check_new_folder(out: StoragePath, what: str) -> None:
    """
    Args:
        what: what the folder is for.

    Raises:
        ConfigError: the folder exists, or would not outlast the command.
    """
    check_kept(out, "OUT")
    if out.exists():
        raise ConfigError(f"{out} exists: choose a new folder for {what}")


def _check_writable(path: Path, key: str) -> None:
    """Check, without writing anything, that a folder exists and is writable, or can be created."""
    existing = next(folder for folder in (path, *path.parents) if _exists(folder))
    if not existing.is_dir():
        raise ConfigError(f"{key} is {path}, but {existing} is a file: choose a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{key} is {path}, but {existing} is read-only: choose a folder that can be written to")
    longest = os.pathconf(existing, "PC_NAME_MAX") - SPARE
    name = max(path.parts, key=_length)
    if _length(name) > longest:
        raise ConfigError(
            f"{key} leads to a file or folder with a name of {_length(name)} bytes, {name[:40]}..., and the disk takes "
            f"{longest}: choose a shorter name"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for the disk
        return False


def _length(name: str) -> int:
    return len(os.fsencode(name))
