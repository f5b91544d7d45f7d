"""Files that are either complete or absent, on a disk or in an object store."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from craft_ray.errors import StorageError
from craft_ray.storage.paths import CHUNK, ObjectPath, StoragePath, copy_tree

TEMPORARY = re.compile(r"\.(?P<of>.+)\.[^.]+\.tmp")


@contextmanager
def new_file(path: StoragePath) -> Iterator[Path]:
    """A temporary file to write to; it becomes `path` at the end, and is deleted on any error.

    Raises:
        StorageError: the disk is full or the file cannot be written; an older `path` is untouched.
    """
    if isinstance(path, ObjectPath):
        with _scratch() as folder:
            yield folder / path.name
            path.upload(folder / path.name)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written ({error.strerror or error}): free space or choose another folder; what was "
            f"complete before is untouched"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: StoragePath, last: str | None = None) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` at the end (an older one is replaced), and is deleted on any error.

    Args:
        last: the file that makes the folder valid. An object store has no folders to rename: there this file is
            uploaded after all others.

    Raises:
        StorageError: as in `new_file`.
    """
    if isinstance(path, ObjectPath):
        assert last is not None, "nothing would distinguish half a folder from a whole one"
        with _scratch() as folder:
            yield folder
            (folder / last).rename(folder.with_name(last))
            copy_tree(folder, path)
            (path / last).upload(folder.with_name(last))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                _sync(file)
        old = _beside(path)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written ({error.strerror or error}): free space or choose another folder; what was "
            f"complete before is untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, which is relative to its folder; an older link is replaced."""
    temporary = _beside(path)
    try:
        temporary.symlink_to(target)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -- temporary names: made, recognised and cleared here only


def _beside(path: Path) -> Path:
    """A name that is unique across nodes: processes in two containers often have the same process number."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def is_temporary(path: Path, of: str | None = None) -> bool:
    """Whether a process is writing this file or folder or left it half-written: for the name `of`, or for any."""
    match = TEMPORARY.fullmatch(path.name)
    return match is not None and of in (None, match["of"])


def clear_leftovers(folder: StoragePath, of: str | None = None) -> None:
    """Remove what killed processes left half-written in `folder`: for the name `of`, or for all names.

    Only the process that holds the folder's lock may call this: files that another process is writing would also be
    removed. A store has nothing to remove: an object appears when it is complete.
    """
    if not isinstance(folder, Path):
        return
    for left in [entry for entry in folder.glob(".*") if is_temporary(entry, of)]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)  # its writer may remove it at the same moment


def write_atomically(path: StoragePath, text: str) -> None:
    if isinstance(path, ObjectPath):
        path.write_bytes(text.encode())
        return
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: StoragePath, text: str) -> None:
    """Append to a file. An object cannot be appended to: files that grow are written on a disk first.

    Raises:
        StorageError: the disk is full.
    """
    assert isinstance(path, Path), f"{path} cannot grow"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"{path} could not be written ({error.strerror or error}): free space") from error


def checksum(path: StoragePath) -> str:
    """blake3 of a file's content."""
    digest = blake3(max_threads=blake3.AUTO)
    if isinstance(path, Path):
        digest.update_mmap(path)
        return digest.hexdigest()
    with path.open_input() as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def readable_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder on this node's disk for files that are to be uploaded to an object store."""
    with tempfile.TemporaryDirectory(prefix="craft-ray-") as folder:
        (content := Path(folder) / "content").mkdir()
        yield content


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
