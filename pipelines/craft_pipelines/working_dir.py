"""The working directory of a job: a copy of the user's, uploaded to the cluster and deleted there after the job.

What goes into the copy is decided by Ray's own rules (.gitignore and .rayignore among them) and the patterns here. What
a job writes must not go there (pipelines/craft_pipelines/outputs.py).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE as LIMIT  # bytes that a dashboard takes at once
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes  # the files are those that Ray finds

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
"""By which an anchor cache is known. They are craft_ray.anchors.manifest's, whose import brings torch."""

NAMED = 3


def excludes(folder: Path) -> list[str]:
    """Patterns of what a job does not get: `EXCLUDED`, and the anchor caches, wherever they are."""
    return [*EXCLUDED, *(f"/{cache.relative_to(folder)}" for cache in _caches(folder))]


def _caches(folder: Path) -> list[Path]:
    found = []
    for place, folders, files in os.walk(folder):
        if SHARDS in folders and (MANIFEST in files or PLAN in files):
            found.append(Path(place))
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".") and name != "node_modules"]
    return sorted(found)


def check_size(folder: Path, patterns: Sequence[str]) -> int:
    """Bytes of the copy, which is not compressed.

    Raises:
        ConfigError: it is no directory, or more than a cluster takes.
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
    total = sizes.total()
    if total >= LIMIT:
        largest = ", ".join(f"{path} {readable_bytes(size)}" for path, size in sizes.most_common(NAMED))
        raise ConfigError(
            f"the working directory {folder} has {readable_bytes(total)} to upload, a cluster takes less than "
            f"{readable_bytes(LIMIT)} (largest: {largest}): leave files out in a .rayignore, put data on storage that "
            f"the cluster sees, or choose another --working-dir"
        )
    return total
