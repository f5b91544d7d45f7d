"""Files that may be compressed, by their extension."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from craft_ray.data.derived import derived
from craft_ray.errors import first_line


def _zstandard(path: Path) -> Any:
    return pa.input_stream(str(path), compression="zstd")


def _plain(path: Path) -> Any:
    return path.open("rb")


@contextmanager
def _only_member(path: Path) -> Iterator[Any]:
    """The file in an archive of one."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise ValueError(f"{path.name}: it holds {len(members)} files; unpack it")
        if members[0].flag_bits & ENCRYPTED:
            raise ValueError(f"{path.name}: it is encrypted; unpack it")
        with archive.open(members[0]) as stream:
            yield stream


ENCRYPTED = 0x1
"""A member's flag (PKWARE's APPNOTE, 4.4.4)."""
OPEN: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard,
    ".zip": _only_member,
}  # fmt: skip


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The content of a file, decompressed.

    Raises:
        ValueError: it cannot be read to its end.
    """
    try:
        with OPEN.get(path.suffix.lower(), _plain)(path) as stream:
            yield cast(BinaryIO, stream)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path.name}: {first_line(error)}") from None


def expanded(path: Path, content: str) -> Path:
    """The file itself, or a decompressed copy, which has a place for each row.

    Args:
        content: checksum of the file.
    """
    if path.suffix.lower() not in OPEN:
        return path

    def write(target: Path) -> None:
        with target.open("wb") as copy, open_bytes(path) as stream:
            shutil.copyfileobj(stream, copy, 1 << 20)

    return derived(content, ["expanded"], write)
