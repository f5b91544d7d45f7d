"""Files that may be compressed, by their extension."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
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


OPEN: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard,
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
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
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
