"""The description of a config for editors, and of its keys for the documentation."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any

from craft_ray.config.experiment import Experiment
from craft_ray.config.mistakes import sections
from craft_ray.config.types import Section


def descriptions(section: type[Section]) -> dict[str, str]:
    """The string below each field in the source, inherited fields included."""
    base = section.__base__
    found = descriptions(base) if isinstance(base, type) and issubclass(base, Section) else {}
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    for field, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[field.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return found


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config, with the description of each key."""
    schema = Experiment.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "craft-ray config"
    for section in _every_section(Experiment, set()):
        own = schema if section is Experiment else schema["$defs"][section.__name__]
        for key, text in descriptions(section).items():
            if key in own["properties"]:
                own["properties"][key]["description"] = text
    _allow_several(schema)
    return schema


def _every_section(section: type[Section], seen: set[type[Section]]) -> Iterator[type[Section]]:
    if section in seen:
        return
    seen.add(section)
    yield section
    for field in section.model_fields.values():
        for inner in [*sections(field.annotation), *(s for m in field.metadata for s in sections(m))]:
            yield from _every_section(inner, seen)


def _allow_several(schema: Any) -> None:
    """Let a section fit more than one of its kinds: which one it is depends on what is at its path."""
    if isinstance(schema, dict):
        if "oneOf" in schema:
            schema["anyOf"] = schema.pop("oneOf")
        for value in schema.values():
            _allow_several(value)
    elif isinstance(schema, list):
        for value in schema:
            _allow_several(value)
