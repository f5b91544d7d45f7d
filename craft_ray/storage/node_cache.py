"""The cache that the processes of a node share: expanded anchor caches, and copies of inputs from an object store."""

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
    """The cache's folder: $CRAFT_RAY_CACHE, or a folder of this user in the directory for temporary files.

    Raises:
        StorageError: another user created that folder and could put anything into it.
    """
    named = os.environ.get("CRAFT_RAY_CACHE")
    root = Path(named) if named else Path(tempfile.gettempdir()) / f"craft-ray-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise StorageError(f"{root} belongs to another user: set CRAFT_RAY_CACHE to a folder of your own")
    return root


@contextmanager
def filled_once(name: str, root: Path | None = None) -> Iterator[tuple[Path, bool]]:
    """An entry of the cache, and whether this process has to fill it; others on the node wait until it is filled.

    Args:
        root: the cache's folder, which exists. Default: `node_cache()`.
    """
    target = (root or node_cache()) / name
    if target.exists():
        yield target, False
        return
    with (target.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            clear_leftovers(target.parent, of=name)
        yield target, not target.exists()


def local_copy(path: str, key: str, without: str | None = None) -> str:
    """The same file, folder or pattern on this node: `path` itself, or a copy of what it names in an object store.

    A copy is identified by the names, sizes and times of its files, so files that have changed are copied again.

    Args:
        key: the config key that names the path, for errors.
        without: pattern of the names of files that are left out of a copy.

    Raises:
        ConfigError: there is nothing at the path in an object store, or the system does not let this user read it.
    """
    if not is_object(path):
        _check_readable(path, key)
        return path
    remote = through_last(ObjectPath(path))
    is_file = remote.is_file()
    pattern = remote.name if glob.has_magic(remote.name) and not is_file else None
    root = remote.parent if pattern or is_file else remote
    named = [info for info in root.listing() if info.is_file and _is_named(info, root, remote, pattern)]
    found = [info for info in named if without is None or not fnmatch(info.base_name, without)]
    if not found:
        raise ConfigError(f"{key}: there is nothing at {path}: specify a file, a folder or a pattern of files")
    files = [[info.path, info.size, str(info.mtime)] for info in found]
    name = blake3(json.dumps([path, files]).encode()).hexdigest()[:32]
    with filled_once(f"input-{name}") as (target, ours):
        if ours:
            with new_folder(target) as temporary:
                for info in found:
                    source = ObjectPath(f"s3://{info.path}")
                    copy = temporary / root.name / source.key.relative_to(root.key)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy_tree(source, copy)
    folder = target / root.name
    return str(folder if root == remote else folder / remote.name)


def _check_readable(path: str, key: str) -> None:
    """Refuse a path that the system does not look up: a name that is too long, links in a circle, a folder that this
    user may not open. If nothing is there, the path may be a pattern, or a name on the hub.

    Raises:
        ConfigError: it is such a path.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return
    except OSError as error:
        raise ConfigError(f"{key}: {path} does not open ({error.strerror}): specify a path that does") from None
    if not os.access(path, os.R_OK | os.X_OK if os.path.isdir(path) else os.R_OK):
        raise ConfigError(f"{key}: {path} may not be read by this user: change its permissions, or copy it")


def _is_named(info: Any, root: ObjectPath, remote: ObjectPath, pattern: str | None) -> bool:
    if root == remote:
        return True
    source = ObjectPath(f"s3://{info.path}")
    return source.parent == root and (fnmatch(source.name, pattern) if pattern else source == remote)
