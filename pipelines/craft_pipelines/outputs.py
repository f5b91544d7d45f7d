"""Where a stage may write: not into a job's working directory, which is deleted after the job."""

from __future__ import annotations

import os
from pathlib import Path

from craft_ray.errors import ConfigError
from craft_ray.storage.paths import StoragePath

UPLOADED = f"{os.sep}runtime_resources{os.sep}working_dir_files{os.sep}"
"""Part of the path of Ray's copy of a working directory, on every node."""


def check_kept(path: StoragePath, key: str) -> None:
    """Refuse to write into the working directory of a job.

    Args:
        key: the config key or the option that names the path.

    Raises:
        ConfigError: `path` is in that directory.
    """
    if isinstance(path, Path) and UPLOADED in os.path.abspath(path):
        raise ConfigError(
            f"{key} is {path}, in the working directory that was uploaded with this job and is deleted after it: use "
            f"an absolute path on storage that all nodes share, or s3://BUCKET/FOLDER"
        )
