"""Which columns of a table are the prompt, the response, the image: by their usual names and by what is in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.config import INSTRUCTION, Columns, recognised
from craft_ray.data.cells import cut
from craft_ray.errors import ConfigError

PROMPTS = ("prompt", "question", "query", "instruction", "input", "problem", "source", "sentence", "text")
RESPONSES = ("response", "answer", "completion", "output", "target", "solution", "reply", "caption", "label")
IMAGES = ("image", "images", "picture", "pictures", "photo", "photos", "img")
CHOICES = ("choices", "options", "endings")
INDICES = ("answer_index", "answer_idx", "label", "answer", "gold")
IDS = ("id", "uid", "sample_id")
RUNNING_TEXT = ("text", "content")
"""The single column of text that a language model continues, without a prompt."""


@dataclass(frozen=True)
class Found:
    """The columns of a table, and what they are."""

    columns: Columns
    running_text: bool
    """Whether there is only running text, without prompts."""


def find_columns(
    names: Sequence[str], rows: Sequence[dict[str, Any]], where: str, labelled: bool, images: bool, template: bool
) -> Found:
    """The columns of a table.

    Args:
        rows: some of its rows, with all columns.
        where: the table in errors.
        labelled: whether there must be a response, as there is in a task; anchors need none.
        images: whether the model reads images.
        template: whether it has a chat template.

    Raises:
        ConfigError: none of the columns is known by name.
    """
    lists = {name for name in names if any(isinstance(row.get(name), list) for row in rows)}
    running = False
    found: dict[str, str | None] = {}
    messages = recognised(Columns(), names).messages
    if messages in lists or (messages == INSTRUCTION and (template or "input" in names)):
        found = {"prompt": None, "messages": messages}
        if "tools" in names:
            found["tools"] = "tools"
    else:
        found = _prompt_and_response(names, lists, rows)
        running = found.get("prompt", "") is None
        if "prompt" not in found:
            raise ConfigError(
                f"{where} has the columns {cut(', '.join(names))}: none of them is known as a prompt "
                f"({', '.join(PROMPTS)}) or a conversation (messages, conversations): rename a column, or write the "
                f"config by hand, where columns.prompt may have any name"
            )
        if labelled and not {"response", "answer_index"} & found.keys():
            raise ConfigError(
                f"{where} has the columns {cut(', '.join(names))}: none of them is known as a response "
                f"({', '.join(RESPONSES)}): rename a column, or write the config by hand, where columns.response may "
                f"have any name"
            )
    if images:
        image = _named(IMAGES, names) or next((n for n in names if any(_is_image(row.get(n)) for row in rows)), None)
        found |= {} if image is None else {"image": image}
    identity = _named(IDS, names)
    if identity is not None:
        found = {"id": identity, **found}
    if not labelled:
        text = found.get("response") if running else found.get("prompt")
        found = {role: name for role, name in found.items() if role not in ("response", "choices", "answer_index")}
        found["prompt"] = text
    return Found(Columns.model_validate(found), running)


def _prompt_and_response(
    names: Sequence[str], lists: Collection[str], rows: Sequence[dict[str, Any]]
) -> dict[str, str | None]:
    plain = [name for name in names if name not in lists]
    prompt = _named(PROMPTS, plain)
    response = _named(RESPONSES, [name for name in plain if name != prompt])
    if response is None and prompt not in (None, "prompt", "question") and _named(RUNNING_TEXT, plain) == prompt:
        return {"prompt": None, "response": prompt}
    found: dict[str, str | None] = {} if prompt is None else {"prompt": prompt}
    choices = _named(CHOICES, sorted(lists))
    index = _named(INDICES, plain)
    if choices is not None:
        if index is not None and all(_is_index(row.get(index)) for row in rows):
            return found | {"choices": choices, "answer_index": index}
        found["choices"] = choices
    return found if response is None else found | {"response": response}


def _named(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    """The first wanted name that exists, in upper or lower case."""
    present = {name.lower(): name for name in names}
    return next((present[name] for name in wanted if name in present), None)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_image(value: Any) -> bool:
    """Whether a cell holds the bytes of an image, alone or with its path, or a list of such images."""
    if isinstance(value, list):
        return any(map(_is_image, value))
    return isinstance(value, bytes) or (isinstance(value, dict) and {"bytes", "path"} <= value.keys())
