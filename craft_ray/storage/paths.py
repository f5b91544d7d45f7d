"""Paths of files: on a disk or a shared mount (`Path`), or in an object store (`ObjectPath`, s3://bucket/key).

An `ObjectPath` offers the part of pathlib's interface that caches, runs and sweeps need, on pyarrow's filesystems. An
object appears when it is complete, as a renamed file does, so a reader never sees half of one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache, total_ordering
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs

from craft_ray.errors import StorageError

SCHEME = "s3://"
CHUNK = 8 << 20
"""Bytes that are transferred at once."""
ATTEMPTS = 4
"""How often to try to read an object that another process replaces at the same moment."""


@dataclass(frozen=True)
class Size:
    """The part of a file's `stat` that is used."""

    st_size: int


@total_ordering
class ObjectPath:
    """An object or a common prefix of names ("folder") in a store. Like a path, it need not exist."""

    def __init__(self, uri: str) -> None:
        assert uri.startswith(SCHEME), uri
        self.key = PurePosixPath(uri.removeprefix(SCHEME))
        """The bucket, and the name in it."""

    # -- its name

    def __str__(self) -> str:
        return f"{SCHEME}{self.key}"

    def __repr__(self) -> str:
        return f"ObjectPath('{self}')"

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is in an object store: open it with its own methods")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and self.key == other.key

    def __lt__(self, other: ObjectPath) -> bool:
        return self.key < other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{SCHEME}{self.key / name}")

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def suffix(self) -> str:
        return self.key.suffix

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(f"{SCHEME}{self.key.parent}")

    @property
    def parents(self) -> list[ObjectPath]:
        return [ObjectPath(f"{SCHEME}{key}") for key in self.key.parents if str(key) != "."]

    def with_name(self, name: str) -> ObjectPath:
        return ObjectPath(f"{SCHEME}{self.key.with_name(name)}")

    def with_suffix(self, suffix: str) -> ObjectPath:
        return ObjectPath(f"{SCHEME}{self.key.with_suffix(suffix)}")

    def absolute(self) -> ObjectPath:
        return self

    def resolve(self) -> ObjectPath:
        return self

    # -- what exists

    def exists(self) -> bool:
        return self._info().type != pa.fs.FileType.NotFound

    def is_file(self) -> bool:
        return self._info().type == pa.fs.FileType.File

    def is_dir(self) -> bool:
        return self._info().type == pa.fs.FileType.Directory

    def stat(self) -> Size:
        info = self._info()
        if info.type == pa.fs.FileType.NotFound:
            raise FileNotFoundError(str(self))
        return Size(info.size or 0)

    def iterdir(self) -> Iterator[ObjectPath]:
        """The direct children, by name; none if there is no such folder."""
        return (ObjectPath(f"{SCHEME}{info.path}") for info in self.listing(recursive=False))

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """The direct children whose names match."""
        assert "/" not in pattern
        assert "**" not in pattern
        return (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def listing(self, recursive: bool = True) -> list[Any]:
        """pyarrow's FileInfo of the entries below, by name."""
        selector = pa.fs.FileSelector(str(self.key), recursive=recursive, allow_not_found=True)
        with _store_errors(self, "listed"):
            return sorted(_filesystem(self.key.parts[0]).get_file_info(selector), key=lambda info: info.path)

    # -- its content

    def read_bytes(self) -> bytes:
        """The whole content as it was at one moment, even if another process replaces or deletes the object meanwhile.

        pyarrow asks for the size first and pads whatever arrives to that size; if nothing arrives, its error does not
        say so.

        Raises:
            FileNotFoundError: the object does not exist, or no longer exists.
        """
        for attempt in range(1, ATTEMPTS + 1):
            with self.open_input() as file, _store_errors(self, "read"):
                try:
                    content = bytes(file.read())
                except OSError:
                    if attempt == ATTEMPTS:
                        raise
                    continue
                if self.stat().st_size == file.size():
                    return content
        raise StorageError(f"{self} changed {ATTEMPTS} times while it was read: stop the process that writes to it")

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open_input(self) -> pa.NativeFile:
        """The object, open for reading at any position.

        Raises:
            FileNotFoundError: the object does not exist.
        """
        with _store_errors(self, "read"):
            return _filesystem(self.key.parts[0]).open_input_file(str(self.key))

    def write_bytes(self, data: bytes) -> None:
        with _store_errors(self, "written"), _filesystem(self.key.parts[0]).open_output_stream(str(self.key)) as file:
            file.write(data)

    def upload(self, source: Path) -> None:
        """Upload a local file, which must not change meanwhile, to this path."""
        copy_tree(source, self)

    def unlink(self, missing_ok: bool = False) -> None:
        if not self.is_file():
            if missing_ok:
                return
            raise FileNotFoundError(str(self))
        with _store_errors(self, "deleted"):
            _filesystem(self.key.parts[0]).delete_file(str(self.key))

    def mkdir(self, **_: Any) -> None:
        """Do nothing: a store has no folders."""

    def _info(self) -> Any:
        with _store_errors(self, "accessed"):
            return _filesystem(self.key.parts[0]).get_file_info(str(self.key))


StoragePath = Path | ObjectPath
"""The path of a file or folder."""


def is_object(text: str) -> bool:
    return text.startswith(SCHEME)


def storage_path(text: str) -> StoragePath:
    """The path that a user or a config gives as text."""
    return ObjectPath(text) if is_object(text) else Path(text)


def readable(path: StoragePath) -> Path | pa.NativeFile:
    """A path in the form that pyarrow's readers take."""
    return path if isinstance(path, Path) else path.open_input()


def copy_tree(source: StoragePath, target: StoragePath) -> None:
    """Copy a file, or a folder with everything below it. Files of the same name are replaced.

    Raises:
        StorageError: it could not be read or written; files that were already copied stay.
    """
    with _store_errors(target, "written"):
        if isinstance(target, Path) and not source.is_file():
            target.mkdir(parents=True, exist_ok=True)  # pyarrow makes only the folders in it, so none if it is flat
        pa.fs.copy_files(
            _name_in(source), _name_in(target), source_filesystem=_filesystem_of(source),
            destination_filesystem=_filesystem_of(target), chunk_size=CHUNK,
        )  # fmt: skip


def remove_tree(path: StoragePath) -> None:
    """Delete a folder with everything below it, if it exists."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        with _store_errors(path, "deleted"):
            _filesystem_of(path).delete_dir(str(path.key))


def _name_in(path: StoragePath) -> str:
    """The name of a path in its filesystem."""
    return str(path if isinstance(path, Path) else path.key)


def _filesystem_of(path: StoragePath) -> pa.fs.FileSystem:
    return pa.fs.LocalFileSystem() if isinstance(path, Path) else _filesystem(path.key.parts[0])


def _filesystem(bucket: str) -> pa.fs.FileSystem:
    return _connected(bucket, os.environ.get("AWS_ENDPOINT_URL"))


@lru_cache
def _connected(bucket: str, endpoint: str | None) -> pa.fs.FileSystem:
    """The store of a bucket. Endpoint, region and credentials come from the environment, as in every AWS tool, so that
    no config contains them."""
    with _store_errors(ObjectPath(f"{SCHEME}{bucket}"), "reached"):
        return pa.fs.FileSystem.from_uri(f"{SCHEME}{bucket}")[0]


@contextmanager
def _store_errors(path: StoragePath, what: str) -> Iterator[None]:
    """Report a store's errors in one line; a missing file is left to the caller."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = " ".join(str(error).split())
        raise StorageError(
            f"{path} could not be {what} ({reason[:300]}): check the bucket, the credentials and AWS_ENDPOINT_URL (it "
            f"is {os.environ.get('AWS_ENDPOINT_URL')})"
        ) from error
