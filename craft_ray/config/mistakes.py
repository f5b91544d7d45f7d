"""A mistake in a config as one line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from craft_ray.config.types import Section


def explain(error: Any, schema: type[Section]) -> str:
    """One pydantic error as `key: what is wrong`, with a guess where a key is misspelt."""
    location = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _fields(location[:-1], schema), 1, 0.5)
        guess = f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        return f"unknown key {key}{guess}"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error":
        message += f" (it is {error['input']!r})"
    return f"{key}: {message}" if key else message


def _fields(location: Sequence[str], schema: type[Section]) -> list[str]:
    """The keys of the section at `location`."""
    section: Any = schema
    for part in location:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)
        if section is None:
            return []
    return list(section.model_fields)
