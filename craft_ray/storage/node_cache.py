"""What this node keeps for its processes: expanded caches, and copies of inputs that lie in an object store."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from blake3 import blake3

from craft_ray.errors import ConfigError, StorageError
from craft_ray.storage.files import clear_leftovers, new_folder
from craft_ray.storage.last import through_last
from craft_ray.storage.paths import ObjectPath, copy_tree, is_object


def node_cache() -> Path:
    """The folder: $CRAFT_RAY_CACHE, or one of this user among temporary files.

    Raises:
        StorageError: another user made that folder, who could put anything into it.
    """
    named = os.environ.get("CRAFT_RAY_CACHE")
    root = Path(named) if named else Path(tempfile.gettempdir()) / f"craft-ray-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise StorageError(f"{root} belongs to another user: set CRAFT_RAY_CACHE to a folder of your own")
    return root


@contextmanager
def filled_once(name: str) -> Iterator[tuple[Path, bool]]:
    """An entry of the cache, and whether it is for this process to fill; others of the node wait until it is."""
    target = node_cache() / name
    if target.exists():
        yield target, False
        return
    with (target.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            clear_leftovers(target.parent, of=name)
        yield target, not target.exists()


def at_hand(path: str, key: str) -> str:
    """The same file, folder or pattern on this node: as it is, or the copy of one in an object store.

    A copy is known by names, sizes and times of what is there, so one that has changed is copied again.

    Args:
        key: the config's, for errors.

    Raises:
        ConfigError: there is nothing.
    """
    if not is_object(path):
        return path
    place = through_last(ObjectPath(path))
    pattern = place.name if glob.has_magic(place.name) else None
    root = place.parent if pattern or place.is_file() else place
    found = [info for info in root.listing() if info.is_file and _asked(info, root, place, pattern)]
    if not found:
        raise ConfigError(f"{key}: there is nothing at {path}: name a file, a folder or a pattern of files")
    what = [[info.path, info.size, str(info.mtime)] for info in found]
    name = blake3(json.dumps([path, what]).encode()).hexdigest()[:32]
    with filled_once(f"input-{name}") as (target, ours):
        if ours:
            with new_folder(target) as temporary:
                for info in found:
                    source = ObjectPath(f"s3://{info.path}")
                    copy = temporary / root.name / source.key.relative_to(root.key)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy_tree(source, copy)
    folder = target / root.name
    return str(folder if root == place else folder / place.name)


def _asked(info: Any, root: ObjectPath, place: ObjectPath, pattern: str | None) -> bool:
    if root == place:
        return True
    source = ObjectPath(f"s3://{info.path}")
    return source.parent == root and (fnmatch(source.name, pattern) if pattern else source == place)
