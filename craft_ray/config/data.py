"""Where samples are read from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from craft_ray.config.paths import PathOrHubName
from craft_ray.config.types import Episodes, Section


class Columns(Section):
    """Names of the columns of a data source. A column that is not named is not read."""

    id: str | None = None
    """Unique name of a sample; the row number where it is not named."""
    image: str | None = None
    """A path, encoded bytes (PNG, JPEG), a `{bytes, path}` pair or an array of uint8 (height, width[, channel])."""
    prompt: str | None = "prompt"
    """What the model is given."""
    response: str | None = None
    """What the model shall answer. Anchors need none."""
    choices: str | None = None
    """The answers among which `metric: choice` decides."""
    answer_index: str | None = None
    """Which of the choices is right, from 0; in place of a response."""

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        if self.answer_index is not None and self.response is not None:
            raise ValueError(
                f"response '{self.response}' and answer_index '{self.answer_index}' both say what is right: name one "
                f"of them"
            )
        if self.answer_index is not None and self.choices is None:
            raise ValueError(f"answer_index '{self.answer_index}' counts choices: name their column under choices, too")
        return self


class DataConfig(Section):
    """A place that samples are read from."""

    path: PathOrHubName
    """A file, a folder, a glob pattern of text files (local, of a shared mount, or s3://), or a hub name."""
    format: Literal["auto", "jsonl", "parquet", "dataset", "text", "lerobot"] = "auto"
    """`auto` goes by the ending: .jsonl/.json, .parquet, .txt/.md/.py; a folder with meta/info.json is a
    LeRobotDataset; otherwise a Hugging Face dataset. For a LeRobotDataset on the hub say `lerobot`."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    revision: str | None = None
    """Commit or tag of a hub dataset."""
    columns: Columns = Columns()
    limit: int | None = Field(None, ge=1)
    """Read only the first rows."""
    episodes: Episodes = None
    """Episodes of a LeRobotDataset: numbers, or ranges such as `0-39`. Default: all."""
    stride: int = Field(1, ge=1)
    """Take every N-th frame of a LeRobotDataset."""
    rename: dict[str, str] = {}
    """Names of a LeRobotDataset's features to the policy's, e.g. `{observation.images.top:
    observation.images.base_0_rgb}`."""
    chunk_chars: int = Field(512, ge=1)
    """Length of a chunk of a plain text file, in characters. A text source has the one column `text`."""
