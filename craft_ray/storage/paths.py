"""Where files lie: on a disk or a shared mount (`Path`), or in an object store (`ObjectPath`, s3://bucket/key).

An `ObjectPath` offers the part of pathlib's interface that caches, runs and sweeps need, on pyarrow's filesystems. An
object appears when all of it is there, as a renamed file does, so a reader never sees half of one.
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
"""Bytes that are sent at once."""
ATTEMPTS = 4
"""Times that an object is read which another process replaces at that very moment."""


@dataclass(frozen=True)
class Size:
    """What of a file's `stat` is used."""

    st_size: int


@total_ordering
class ObjectPath:
    """An object or a common beginning of names ("folder") in a store. Like a path it says nothing of what is there."""

    def __init__(self, uri: str) -> None:
        assert uri.startswith(SCHEME), uri
        self.key = PurePosixPath(uri.removeprefix(SCHEME))
        """Bucket and name in it."""

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

    # -- what is there

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
        """What lies directly below, by name; nothing where there is no such folder."""
        return (ObjectPath(f"{SCHEME}{info.path}") for info in self.listing(recursive=False))

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """What lies directly below and is called so."""
        assert "/" not in pattern
        assert "**" not in pattern
        return (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def listing(self, recursive: bool = True) -> list[Any]:
        """pyarrow's FileInfo of what is below, by name."""
        selector = pa.fs.FileSelector(str(self.key), recursive=recursive, allow_not_found=True)
        with _told(self, "listed"):
            return sorted(_filesystem(self.key.parts[0]).get_file_info(selector), key=lambda info: info.path)

    # -- its content

    def read_bytes(self) -> bytes:
        """The whole content as it was at one moment, also where another process replaces or deletes it meanwhile.

        pyarrow asks for the size first. It fills up to that size whatever arrives, and where nothing does the error is
        not the one that says so.

        Raises:
            FileNotFoundError: there is none, or none any more.
        """
        for attempt in range(1, ATTEMPTS + 1):
            with self.open_input() as file, _told(self, "read"):
                try:
                    content = bytes(file.read())
                except OSError:
                    if attempt == ATTEMPTS:
                        raise
                    continue
                if self.stat().st_size == file.size():
                    return content
        raise StorageError(f"{self} changed {ATTEMPTS} times while it was read: end what else writes to it")

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open_input(self) -> pa.NativeFile:
        """The object to read from, at any place.

        Raises:
            FileNotFoundError: there is none.
        """
        with _told(self, "read"):
            return _filesystem(self.key.parts[0]).open_input_file(str(self.key))

    def write_bytes(self, data: bytes) -> None:
        with _told(self, "written"), _filesystem(self.key.parts[0]).open_output_stream(str(self.key)) as file:
            file.write(data)

    def upload(self, source: Path) -> None:
        """Become a copy of a local file, which nobody writes to meanwhile."""
        copy_tree(source, self)

    def unlink(self, missing_ok: bool = False) -> None:
        if not self.is_file():
            if missing_ok:
                return
            raise FileNotFoundError(str(self))
        with _told(self, "deleted"):
            _filesystem(self.key.parts[0]).delete_file(str(self.key))

    def mkdir(self, **_: Any) -> None:
        """Nothing: a store has no folders of its own."""

    def _info(self) -> Any:
        with _told(self, "looked at"):
            return _filesystem(self.key.parts[0]).get_file_info(str(self.key))


StoragePath = Path | ObjectPath
"""Where a file or folder lies."""


def is_object(text: str) -> bool:
    return text.startswith(SCHEME)


def storage_path(text: str) -> StoragePath:
    """The place that a user or a config names."""
    return ObjectPath(text) if is_object(text) else Path(text)


def readable(place: StoragePath) -> Path | pa.NativeFile:
    """What pyarrow's readers take."""
    return place if isinstance(place, Path) else place.open_input()


def copy_tree(source: StoragePath, target: StoragePath) -> None:
    """Copy a file, or a folder with all that is below it. Files of the same name are replaced.

    Raises:
        StorageError: it could not be read or written; what arrived so far stays.
    """
    with _told(target, "written"):
        pa.fs.copy_files(
            _name(source), _name(target), source_filesystem=_of(source), destination_filesystem=_of(target),
            chunk_size=CHUNK,
        )  # fmt: skip


def remove_tree(place: StoragePath) -> None:
    """Delete a folder with all that is below it, if it is there."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
    elif place.exists():
        with _told(place, "deleted"):
            _of(place).delete_dir(str(place.key))


def _name(place: StoragePath) -> str:
    return str(place if isinstance(place, Path) else place.key)


def _of(place: StoragePath) -> pa.fs.FileSystem:
    return pa.fs.LocalFileSystem() if isinstance(place, Path) else _filesystem(place.key.parts[0])


def _filesystem(bucket: str) -> pa.fs.FileSystem:
    return _connected(bucket, os.environ.get("AWS_ENDPOINT_URL"))


@lru_cache
def _connected(bucket: str, endpoint: str | None) -> pa.fs.FileSystem:
    """The store of a bucket. Endpoint, region and credentials are those of the environment, as every tool of AWS takes
    them, so that none of them stands in a config."""
    with _told(ObjectPath(f"{SCHEME}{bucket}"), "reached"):
        return pa.fs.FileSystem.from_uri(f"{SCHEME}{bucket}")[0]


@contextmanager
def _told(place: StoragePath, what: str) -> Iterator[None]:
    """An error of a store in one line. That nothing is there is the caller's to judge."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = " ".join(str(error).split())
        raise StorageError(
            f"{place} could not be {what} ({reason[:300]}): check the bucket, the credentials and AWS_ENDPOINT_URL (it "
            f"is {os.environ.get('AWS_ENDPOINT_URL')})"
        ) from error
