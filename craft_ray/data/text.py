"""Plain text, one chunk per row."""

from __future__ import annotations

import codecs
import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from craft_ray.data.arrow import ArrowTable
from craft_ray.data.compressed import open_bytes
from craft_ray.data.formats import short_names

BATCH = 1 << 16


def read_text(files: Sequence[Path], size: int) -> ArrowTable:
    """Chunks of `size` characters; none crosses the end of a file. Every line ending becomes a newline, and a byte
    order mark is not text.

    Raises:
        ValueError: a file is not UTF-8.
    """
    parts, identity = [], ""
    for file, short in short_names(files).items():
        with open_bytes(file) as stream:
            data = stream.read()
        if data.startswith(codecs.BOM_UTF8):
            identity = "without byte order marks"
        try:
            text = io.IncrementalNewlineDecoder(None, translate=True).decode(data.decode("utf-8-sig"), final=True)
        except UnicodeDecodeError as error:
            raise ValueError(f"{short}: byte {error.start} is not UTF-8; save it as that") from None
        chunks = [text[start : start + size] for start in range(0, len(text), size)]
        columns = [pa.array(chunks[start : start + BATCH], pa.large_string()) for start in range(0, len(chunks), BATCH)]
        parts.append((short, pa.table({"text": pa.chunked_array(columns, pa.large_string())})))
    return ArrowTable(parts, ["text"], identity=identity)
