"""Data sources: one model for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from craft_ray.config.kinds import Kind, without_unused
from craft_ray.config.mistakes import explain
from craft_ray.config.paths import PathOrHubName
from craft_ray.config.types import Episodes, Section
from craft_ray.errors import ConfigError

ENDINGS = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text", ".md": "text", ".py": "text", ".rst": "text",
}  # fmt: skip
"""Formats by file extension."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""What may follow such an extension."""


def ending(path: str | PurePath) -> str:
    """The extension of a file in lower case, without that of a compression: `.jsonl` for `A.JSONL.gz`."""
    name = PurePath(path).name.lower()
    for compression in COMPRESSED:
        name = name.removesuffix(compression)
    return PurePath(name).suffix


class Columns(Section):
    """Names of the columns of a data source. A column that is not named is not read."""

    id: str | None = None
    """Unique name of a sample. Default: the row number."""
    image: str | None = None
    """A path, encoded bytes (PNG, JPEG), a `{bytes, path}` pair, a data URI or an array of uint8 (height, width[,
    channel])."""
    prompt: str | None = "prompt"
    """The input text of the model."""
    response: str | None = None
    """The expected answer. Anchors need none."""
    choices: str | None = None
    """The answers that `metric: choice` compares."""
    answer_index: str | None = None
    """Index of the right choice, from 0; replaces the response."""

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        if self.answer_index is not None and self.response is not None:
            raise ValueError(
                f"response '{self.response}' and answer_index '{self.answer_index}' both give the answer: specify "
                f"only one"
            )
        if self.answer_index is not None and self.choices is None:
            raise ValueError(f"answer_index '{self.answer_index}' is an index into choices: specify choices, too")
        return self


class Data(Kind):
    """A source of samples."""

    key: ClassVar[str] = "format"

    path: PathOrHubName
    """A file, a folder or a glob pattern (local, on a shared mount, or s3://), or a hub name."""
    format: str = "auto"
    """`auto` depends on what is at the path when it is opened: the extension of a file (.jsonl/.ndjson/.json,
    .csv/.tsv, .parquet, .txt/.md/.py/.rst; upper case and .gz, .bz2, .xz, .zst behind it are fine), the files in a
    folder, with meta/info.json a LeRobotDataset; anything else is a Hugging Face dataset. A key that only one format
    has also selects that format. For a LeRobotDataset on the hub set `lerobot`."""
    limit: int | None = Field(None, ge=1)
    """Read only the first rows."""


class TableData(Data):
    """Rows with columns."""

    columns: Columns = Columns()
    split: str = "train"
    """The split that is read: of a data set on the hub or on disk, or of a folder whose files have a split in their
    names (`train.csv`, `test-0.csv`). Without one in any name, all files are `train`. `train[:90%]` is a part."""


class AutoData(TableData):
    """A source whose kind is decided when it is opened, because neither the extension nor a key determines it."""

    tags: ClassVar[tuple[str, ...]] = ("auto",)
    noun: ClassVar[str] = "what is found at the path"

    format: Literal["auto"] = "auto"


class JsonLinesData(TableData):
    """Files with one JSON object per line, or with a list of objects."""

    tags: ClassVar[tuple[str, ...]] = ("jsonl",)
    noun: ClassVar[str] = "JSON lines"

    format: Literal["auto", "jsonl"] = "auto"


class CsvData(TableData):
    """CSV files (RFC 4180) with a header; every value is the text that is written."""

    tags: ClassVar[tuple[str, ...]] = ("csv",)
    noun: ClassVar[str] = "CSV files"

    format: Literal["auto", "csv"] = "auto"
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """The character between two values. Default: a tab in .tsv files, otherwise a comma."""


class ParquetData(TableData):
    """Parquet files."""

    tags: ClassVar[tuple[str, ...]] = ("parquet",)
    noun: ClassVar[str] = "Parquet files"

    format: Literal["auto", "parquet"] = "auto"


class HuggingFaceData(TableData):
    """A dataset that Hugging Face datasets loads, from the hub or from a disk."""

    tags: ClassVar[tuple[str, ...]] = ("dataset",)
    noun: ClassVar[str] = "a Hugging Face dataset"

    format: Literal["auto", "dataset"] = "auto"
    revision: str | None = None
    """Commit or tag on the hub."""


class TextData(TableData):
    """Plain text files, cut into chunks. They have a single column, `text`."""

    tags: ClassVar[tuple[str, ...]] = ("text",)
    noun: ClassVar[str] = "plain text"

    format: Literal["auto", "text"] = "auto"
    chunk_chars: int = Field(512, ge=1)
    """Length of a chunk, in characters."""


class LeRobotData(Data):
    """Episodes of a LeRobotDataset (docs/lerobot.md); needs the extra `lerobot`."""

    tags: ClassVar[tuple[str, ...]] = ("lerobot",)
    noun: ClassVar[str] = "a LeRobotDataset"

    format: Literal["auto", "lerobot"] = "auto"
    revision: str | None = None
    """Commit or tag on the hub."""
    episodes: Episodes = None
    """Episodes that are read: numbers, or ranges such as `0-39`. Default: all."""
    stride: int = Field(1, ge=1)
    """Take every N-th frame."""
    rename: dict[str, str] = {}
    """Maps the data set's feature names to the policy's, e.g. `{observation.images.top:
    observation.images.base_0_rgb}`."""


KINDS: dict[str, type[Data]] = {
    "jsonl": JsonLinesData,
    "csv": CsvData,
    "parquet": ParquetData,
    "dataset": HuggingFaceData,
    "text": TextData,
    "lerobot": LeRobotData,
    "auto": AutoData,
}


def _format(value: Any) -> str:
    """The format of a section: the one it names; else that of the path's extension; else the one whose keys it has."""
    if isinstance(value, Data):
        return value.tags[0]
    if not isinstance(value, Mapping):
        return "auto"
    named = value.get("format", "auto")
    if named != "auto":
        return str(named)
    found = ENDINGS.get(ending(str(value.get("path"))))
    if found is not None:
        return found
    keys = without_unused(value, AutoData, list(KINDS.values())).keys() - AutoData.model_fields.keys()
    known = {name: len(keys & kind.model_fields.keys()) for name, kind in KINDS.items()}
    return max(known, key=known.__getitem__) if any(known.values()) else "auto"


def _without_unused(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    own = KINDS.get(_format(value))
    return value if own is None else without_unused(value, own, list(KINDS.values()))


DataConfig = Annotated[
    Annotated[JsonLinesData, Tag("jsonl")]
    | Annotated[CsvData, Tag("csv")]
    | Annotated[ParquetData, Tag("parquet")]
    | Annotated[HuggingFaceData, Tag("dataset")]
    | Annotated[TextData, Tag("text")]
    | Annotated[LeRobotData, Tag("lerobot")]
    | Annotated[AutoData, Tag("auto")],
    Discriminator(_format),
    BeforeValidator(_without_unused),
]


def as_format(config: DataConfig, found: str, key: str) -> DataConfig:
    """Convert a section whose format is `auto` to the format that was found at its path.

    Args:
        key: the section's key in the configuration, for errors (`task`, `anchors.source`).

    Raises:
        ConfigError: the section has a key that this format does not have.
    """
    if config.tags[0] == found:
        return config
    adapter: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
    try:
        return adapter.validate_python({**config.model_dump(), "format": found})
    except ValidationError as error:
        raise ConfigError("; ".join(explain(e, DataConfig, key) for e in error.errors())) from None
