"""The working directory of a job: a copy of the user's, uploaded to the cluster and deleted there after the job.

Ray's own rules (.gitignore and .rayignore among them) and the patterns here decide what the copy contains. The outputs
of a job must not be written there (pipelines/craft_pipelines/outputs.py).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE as LIMIT  # bytes that a dashboard takes at once
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes  # to count the files that Ray finds

from craft_ray.errors import ConfigError
from craft_ray.storage.files import readable_bytes

EXCLUDED = (
    ".git",
    ".venv*",
    "venv",
    "__pycache__",
    ".*_cache",
    ".ipynb_checkpoints",
    "*.egg-info",
    "node_modules",
    "/runs",
    "/craft-demo*",
    "wandb",
    "mlruns",
)
"""Never needed by a job, often large; patterns as in .gitignore."""

MANIFEST, PLAN, SHARDS = "manifest.json", "plan.json", "shards"
"""Names by which an anchor cache is recognized. They are those of craft_ray.anchors.manifest, which imports torch."""

MAX_LISTED = 3


def excludes(folder: Path) -> list[str]:
    """Patterns of files that are not copied: `EXCLUDED`, and all anchor caches."""
    return [*EXCLUDED, *(f"/{cache.relative_to(folder)}" for cache in _caches(folder))]


def _caches(folder: Path) -> list[Path]:
    found = []
    for path, folders, files in os.walk(folder):
        if SHARDS in folders and (MANIFEST in files or PLAN in files):
            found.append(Path(path))
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".") and name != "node_modules"]
    return sorted(found)


def check_size(folder: Path, patterns: Sequence[str]) -> int:
    """Bytes of the copy, which is not compressed.

    Raises:
        ConfigError: `folder` is not a directory, or larger than a cluster accepts.
    """
    sizes = contents(folder, patterns)
    total = sizes.total()
    if total >= LIMIT:
        largest = ", ".join(f"{path} {readable_bytes(size)}" for path, size in sizes.most_common(MAX_LISTED))
        raise ConfigError(
            f"the working directory {folder} has {readable_bytes(total)} to upload, a cluster accepts less than "
            f"{readable_bytes(LIMIT)} (largest: {largest}): exclude files in a .rayignore, put data on storage that "
            f"the cluster sees, or choose another --working-dir"
        )
    return total


def contents(folder: Path, patterns: Sequence[str]) -> Counter[Path]:
    """Bytes of each file of the copy, by its path below `folder`.

    Raises:
        ConfigError: `folder` is not a directory.
    """
    if not folder.is_dir():
        raise ConfigError(f"--working-dir is {folder}, and there is no such directory")
    sizes: Counter[Path] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder)] = path.stat().st_size

    ignored = _get_excludes(folder, [*get_runtime_env_default_excludes(), *patterns])
    respects = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    quiet = logging.getLogger(f"{__name__}.travel")
    quiet.disabled = True
    _dir_travel(folder, [ignored], add, include_gitignore=respects, logger=quiet)
    return sizes
