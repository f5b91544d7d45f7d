"""What a first config needs to know of a data set: its columns, its length, how long its samples are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from craft_ray.config import Columns, DataConfig
from craft_ray.data.formats import format_at, looks_local
from craft_ray.data.source import Source, first_rows, open_source
from craft_ray.errors import ConfigError, DataError
from craft_ray.init.columns import find_columns
from craft_ray.init.model import ModelFacts

FIRST = 20
"""Rows whose cells decide what a column is."""
MOST = 2000
"""Rows whose tokens are counted, evenly over the data."""


@dataclass(frozen=True)
class DataFacts:
    """A data set as a first config describes it."""

    path: str
    rows: int
    columns: Columns | None
    """None: a LeRobotDataset has none."""
    format: str | None = None
    """The format of data on the hub, if it has to be named."""
    running_text: bool = False
    """Whether it is running text, without prompts."""
    prompt_tokens: int = 0
    """Tokens of the longest prompt that was inspected, with its image."""
    response_tokens: int = 0
    """Tokens of the longest response, with the token that ends it."""
    answer_tokens: int = 0
    """Nine out of ten responses are not longer."""
    counted: int = 0
    """Rows that were inspected."""

    @property
    def conversations(self) -> bool:
        return self.columns is not None and self.columns.messages is not None

    def section(self, split: str | None = None) -> dict[str, Any]:
        """The section of a config; without `columns` if there are none."""
        found: dict[str, Any] = {"path": self.path}
        if self.format is not None:
            found["format"] = self.format
        if split is not None:
            found["split"] = split
        if self.columns is not None:
            named = {role: name for role, name in self.columns.model_dump().items() if name is not None}
            found["columns"] = named if self.conversations or self.columns.prompt else {"prompt": None, **named}
        return found


def look_at_data(path: str, option: str, model: ModelFacts, labelled: bool) -> DataFacts:
    """Open a data set, name its columns, and count the tokens of its samples.

    Args:
        option: the option of the command that named it, for errors.
        labelled: whether it must have responses; anchors need none.

    Raises:
        ConfigError, DataError: it does not open, or its columns are not known.
    """
    on_hub = not looks_local(path) and format_at(path) is None
    named = "lerobot" if on_hub and model.kind == "lerobot" else None
    config = _section({"path": path} if named is None else {"path": path, "format": named})
    found = first_rows(config, option, FIRST)
    if (found is None) != (model.kind == "lerobot"):
        what = "a table" if found is not None else "a LeRobotDataset"
        raise ConfigError(
            f"{option} {path} is {what}, but --model {model.path} is of kind {model.kind}: choose one for the other"
        )
    if found is None:
        return DataFacts(path, len(open_source(config, option)), None, named)
    names, rows = found
    if not rows:
        raise DataError(f"{option} {path} holds no sample: specify data with at least one row")
    where, images = f"{option} {path}", model.kind == "vision_language"
    columns_found = find_columns(names, rows, where, labelled, images, model.has_template)
    columns = columns_found.columns
    _check_fit(columns, model, where, names)
    source = open_source(_section({"path": path, "columns": columns.model_dump()}), option)
    try:
        source.ids()
    except DataError:  # several rows of one id are common, and rows have numbers
        columns = columns.model_copy(update={"id": None})
    return _measured(path, columns, columns_found.running_text, source, model)


def chat_wanted(model: ModelFacts, data: Sequence[DataFacts]) -> bool:
    """Whether the model's chat template writes the samples: it does if there is one, except in running text."""
    return model.has_template and not any(each.running_text for each in data)


def _check_fit(columns: Columns, model: ModelFacts, where: str, names: Sequence[str]) -> None:
    if columns.messages is not None and not model.has_template:
        raise ConfigError(
            f"{where} holds conversations (column '{columns.messages}'), but {model.path} has no chat template: choose "
            f"a model that was trained on conversations, or data with a prompt and a response"
        )
    if model.kind == "vision_language" and columns.image is None and columns.messages is None:
        raise ConfigError(
            f"{where} has the columns {', '.join(names)}: none of them holds images, which {model.path} reads: rename "
            f"a column to image, or choose a language model"
        )


def _measured(path: str, columns: Columns, running_text: bool, source: Source, model: ModelFacts) -> DataFacts:
    count = min(len(source), MOST)
    samples = (source[index * len(source) // count] for index in range(count))
    images = 0
    if model.kind == "vision_language":
        images = model.image_tokens([source[index] for index in range(min(count, FIRST))])
    chat = model.has_template and not running_text
    sizes = [model.tokens_of(sample, chat, images) for sample in samples]
    answers = sorted(response for _, response in sizes)
    return DataFacts(
        path,
        len(source),
        columns,
        running_text=running_text,
        prompt_tokens=max(prompt for prompt, _ in sizes),
        response_tokens=answers[-1],
        answer_tokens=answers[(9 * len(answers) - 1) // 10],
        counted=count,
    )


def _section(tree: dict[str, Any]) -> DataConfig:
    adapter: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
    return adapter.validate_python(tree)
