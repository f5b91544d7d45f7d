"""Splits: which files of a folder they are, and parts of them. Names and parts are those of Hugging Face datasets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ReadInstruction
from datasets.data_files import SPLIT_KEYWORDS

TRAIN = "train"
KEYWORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
"""`validation` for valid, val and dev, and so on."""


@dataclass(frozen=True)
class Split:
    """A split, or a part of one: `train`, `train[:90%]`, `train[100:200]`."""

    name: str
    written: str

    @classmethod
    def parse(cls, written: str) -> Split:
        return cls(written.partition("[")[0], written)

    def bounds(self, rows: int) -> tuple[int, int]:
        """The first row and the row after the last, in a split of `rows` rows.

        Raises:
            ValueError: it is not a part of a single split.
        """
        if self.name == self.written:
            return 0, rows
        try:
            parts = ReadInstruction.from_spec(self.written).to_absolute({self.name: rows})
        except (AssertionError, ValueError) as error:
            raise ValueError(f"the split '{self.written}' is no part of its {rows} rows ({error})") from None
        if len(parts) != 1:
            raise ValueError(f"the split '{self.written}' has several parts; specify one, such as {self.name}[:90%]")
        start, stop, _ = slice(parts[0].from_, parts[0].to).indices(rows)
        return start, stop


def split_of(file: Path) -> str | None:
    """The split in a file's name: `test` for `digits_test-00000-of-00002.parquet`; None if it has none."""
    words = re.split(r"[-._ 0-9]+", file.name.lower())
    return next((KEYWORDS[word] for word in words if word in KEYWORDS), None)


def files_of_split(files: Sequence[Path], split: str) -> list[Path]:
    """The files of a folder that are the split `split`; without a split in any name, all of them are `train`.

    Raises:
        ValueError: there is no such split, or some names have a split and others have none.
    """
    splits = {file: split_of(file) for file in files}
    named = [file for file in files if splits[file]]
    unnamed = [file for file in files if not splits[file]]
    if named and unnamed:
        raise ValueError(
            f"holds {named[0].name}, which is the split '{splits[named[0]]}', beside {unnamed[0].name}, whose name has "
            f"no split: specify a pattern that matches the files you mean"
        )
    chosen = [file for file in files if (splits[file] or TRAIN) == split]
    if not chosen:
        present = sorted({found or TRAIN for found in splits.values()})
        raise ValueError(f"has no split '{split}', only {', '.join(present)}: specify one of them")
    return chosen
