"""The pointer `last` next to the checkpoints of a run: which of them the run resumes from.

On a disk it is a symbolic link, so that `checkpoints/last/model` is a path like any other. A store has no links: there
it is an object that holds the name.
"""

from __future__ import annotations

from craft_ray.errors import StorageError
from craft_ray.storage.files import replace_link, write_atomically
from craft_ray.storage.paths import ObjectPath, StoragePath

LAST = "last"


def last_checkpoint(folder: StoragePath) -> StoragePath | None:
    """The checkpoint in `folder` that `last` points to; None if there is none yet.

    Raises:
        StorageError: the checkpoint is missing.
    """
    link = folder / LAST
    if isinstance(link, ObjectPath):
        return folder / link.read_text() if link.exists() else None
    if not link.is_symlink():
        return None
    if not link.exists():
        raise StorageError(f"{link} points to {link.readlink()}, which is missing: restore it, or start a new run")
    return link.resolve()


def point_last(folder: StoragePath, name: str) -> None:
    """Make `name` the checkpoint in `folder` that a run resumes from."""
    if isinstance(folder, ObjectPath):
        write_atomically(folder / LAST, name)
    else:
        replace_link(folder / LAST, name)


def forget_last(folder: ObjectPath) -> None:
    """Let no process resume from a checkpoint in `folder` until `last` points to one again."""
    (folder / LAST).unlink(missing_ok=True)


def through_last(path: ObjectPath) -> ObjectPath:
    """Resolve `last` in a path, as a symbolic link on a disk would be resolved."""
    for link in (path, *path.parents):
        if link.name == LAST and link.is_file():
            target = link.parent / link.read_text()
            return target if link == path else target / str(path.key.relative_to(link.key))
    return path
