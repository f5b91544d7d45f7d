"""Data sources: one model for each kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from craft_ray.config.kinds import Kind, without_unused
from craft_ray.config.mistakes import explain
from craft_ray.config.paths import FolderPath, PathOrHubName
from craft_ray.config.types import Episodes, Section, distinct
from craft_ray.errors import ConfigError

ENDINGS = {
    ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text", ".md": "text", ".py": "text", ".rst": "text",
}  # fmt: skip
"""Formats by file extension."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""What may follow such an extension."""


def ending(path: str | PurePath) -> str:
    """The extension of a file in lower case, without that of a compression: `.jsonl` for `A.JSONL.gz`."""
    name = PurePath(path).name.lower()
    for compression in COMPRESSED:
        name = name.removesuffix(compression)
    return PurePath(name).suffix


class Columns(Section):
    """Names of the columns of a data source. A column that is not named is not read. `answer.text` is a value within a
    column, and texts may be put together from several: `prompt: "{question}\n{context}"` (docs/data.md)."""

    id: str | None = None
    """Unique name of a sample. Default: the row number."""
    image: str | Annotated[tuple[str, ...], AfterValidator(distinct)] | None = None
    """A path, encoded bytes (PNG, JPEG), a `{bytes, path}` pair, a data URI or an array of uint8 (height, width[,
    channel]), or a list of them; a list of columns (`[left, right]`) gives their images in order
    (docs/data.md)."""
    messages: str | None = None
    """A conversation: a list of turns with `role` and `content`, or with `from` and `value` (ShareGPT); or the
    `instruction` of rows that also have an `output` (Alpaca). A column `system` next to it is its system turn. It
    replaces prompt and response, and needs `model.chat_template`. If no column is named and there is no `prompt`, then
    `messages`, `conversations`, `conversation` or `instruction` is read (docs/conversations.md)."""
    tools: str | None = None
    """The tools that a conversation may call: a list of JSON schemas."""
    prompt: str | None = "prompt"
    """The input text of the model."""
    response: str | None = None
    """The expected answer. Anchors need none."""
    choices: str | None = None
    """The answers that `metric: choice` compares."""
    answer_index: str | None = None
    """Index of the right choice, from 0; replaces the response."""
    skill: str | None = None
    """Which of the config's `skills` an anchor belongs to."""

    @property
    def images(self) -> tuple[str, ...]:
        """The columns that hold images."""
        return self.image if isinstance(self.image, tuple) else () if self.image is None else (self.image,)

    @model_validator(mode="before")
    @classmethod
    def _no_default_prompt(cls, value: Any) -> Any:
        """A conversation takes the place of the prompt, which has a default."""
        if isinstance(value, Mapping) and value.get("messages") is not None:
            return {"prompt": None} | dict(value)
        return value

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        for name in ("prompt", "response", "answer_index"):
            if self.messages is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"messages '{self.messages}' and {name} '{getattr(self, name)}' are both specified: a conversation "
                    f"holds prompt and response, leave out one of the two"
                )
        if self.tools is not None and self.messages is None:
            raise ValueError(f"tools '{self.tools}' belong to a conversation: specify messages, too")
        if self.answer_index is not None and self.response is not None:
            raise ValueError(
                f"response '{self.response}' and answer_index '{self.answer_index}' both give the answer: specify "
                f"only one"
            )
        if self.answer_index is not None and self.choices is None:
            raise ValueError(f"answer_index '{self.answer_index}' is an index into choices: specify choices, too")
        return self


CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold conversations by their usual names."""
INSTRUCTION = "instruction"
"""The column of Alpaca's rows that represents a conversation, together with `input` and `output`."""


def recognised(columns: Columns, present: Collection[str]) -> Columns:
    """The columns to read: if a config leaves the prompt at its default and the data have no such column, a
    conversation that they have by its usual name."""
    asked = (columns.messages, columns.response, columns.answer_index)
    if "prompt" in present or columns.prompt != Columns().prompt or asked != (None, None, None):
        return columns
    usual = [*CONVERSATIONS, *((INSTRUCTION,) if "output" in present else ())]
    found = next((name for name in usual if name in present), None)
    return columns if found is None else columns.model_copy(update={"messages": found, "prompt": None})


class Data(Kind):
    """A source of samples."""

    key: ClassVar[str] = "format"

    path: PathOrHubName
    """A file, a folder or a glob pattern (local, on a shared mount, or s3://), or a hub name."""
    format: str = "auto"
    """`auto` depends on what is at the path when it is opened: the extension of a file (.jsonl/.ndjson/.json,
    .csv/.tsv, .parquet, .txt/.md/.py/.rst; upper case and .gz, .bz2, .xz, .zst, .zip after it are fine), the files
    in a folder, with meta/info.json a LeRobotDataset; anything else is a Hugging Face dataset. A key that only one
    format has also selects that format. For a LeRobotDataset on the hub set `lerobot`."""
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
    """CSV files (RFC 4180) with a header; every value is text, exactly as written."""

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
    streaming: bool = False
    """Read the rows as training needs them, and store nothing: for data of `task` that do not fit the disk
    (docs/data.md)."""
    shuffle_buffer: int = Field(10_000, ge=1)
    """For `streaming`: rows in memory from which the next one is drawn. 1 keeps the order within a file."""


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
    sample: int | None = Field(None, ge=1)
    """Then take this many frames at random, in their order: only `sample_seed` decides which ones."""
    sample_seed: int = Field(42, ge=0)
    """Seed of `sample` and of the choice among `prompts`."""
    prompts: FolderPath | None = None
    """A JSON file, a list of prompts or `{prompts: [...]}`: each frame gets one of them, at random, instead of its
    task's words."""
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


def format_of(value: Any) -> str:
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


def unused_left_out(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    own = KINDS.get(format_of(value))
    return value if own is None else without_unused(value, own, list(KINDS.values()))


TaggedKinds = (
    Annotated[JsonLinesData, Tag("jsonl")]
    | Annotated[CsvData, Tag("csv")]
    | Annotated[ParquetData, Tag("parquet")]
    | Annotated[HuggingFaceData, Tag("dataset")]
    | Annotated[TextData, Tag("text")]
    | Annotated[LeRobotData, Tag("lerobot")]
    | Annotated[AutoData, Tag("auto")]
)
DataConfig = Annotated[TaggedKinds, Discriminator(format_of), BeforeValidator(unused_left_out)]


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
