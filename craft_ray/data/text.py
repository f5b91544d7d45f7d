"""Plain text, one chunk per row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets


def read_text(files: Sequence[Path], size: int) -> datasets.Dataset:
    """Chunks of `size` characters; none crosses the end of a file."""
    texts = [file.read_text(encoding="utf-8") for file in files]
    chunks = [text[start : start + size] for text in texts for start in range(0, len(text), size)]
    return datasets.Dataset.from_dict({"text": chunks})
