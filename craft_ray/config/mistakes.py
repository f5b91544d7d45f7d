"""Describes a mistake in a config in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from craft_ray.config.types import Section


def explain(error: Any, schema: Any, at: str = "") -> str:
    """One pydantic error as `key: what is wrong`, with a guess if a key is misspelt.

    Args:
        schema: the type that was validated: a section, or a union of kinds of one.
        at: the key of the validated value.
    """
    location = [str(part) for part in error["loc"] if part != "[key]"]
    parents, kinds, own = _walk(location[:-1], schema, at)
    keys, here, _ = _walk(location, schema, at)
    key = ".".join(keys)
    if error["type"] == "extra_forbidden":
        return _unknown(location[-1], ".".join(parents), kinds, own)
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "union_tag_invalid":
        tags, tag = error["ctx"]["expected_tags"], error["ctx"]["tag"]
        return f"{key}.{here[0].key}: Input should be one of {tags} (it is {tag!r})"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error":
        message += f" (it is {error['input']!r})"
    return f"{key}: {message}" if key else message


def _unknown(name: str, section: str, kinds: Sequence[Any], own: Any) -> str:
    """Explain a key that its section does not have."""
    prefix = f"{section}." if section else ""
    owners = [kind.described() for kind in kinds if name in kind.model_fields]
    if owners:
        return (
            f"{prefix}{name} belongs to {' or '.join(owners)}, but {section} is read as {own.described()}: leave it "
            f"out, or set {prefix}{own.key}"
        )
    near = difflib.get_close_matches(
        name, dict.fromkeys(field for kind in kinds for field in kind.model_fields), 1, 0.5
    )
    guess = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"unknown key {prefix}{name}{guess}"


def _walk(location: Sequence[str], schema: Any, at: str) -> tuple[list[str], list[Any], Any]:
    """The keys of a location (pydantic's location also contains the kinds of sections); the possible kinds of the
    section there; and its kind, if it is known."""
    keys, kinds = [at] if at else [], list(sections(schema))
    own = kinds[0] if len(kinds) == 1 else None
    for part in location:
        if len(kinds) > 1 and own is None:
            own = next(kind for kind in kinds if part in kind.tags)
            continue
        if own is not None and part.isdigit():  # an entry of a list of sections
            keys[-1] += f"[{part}]"
            continue
        keys.append(part)
        field = own.model_fields.get(part) if own is not None else None
        kinds = [] if field is None else list(sections(field.annotation))
        own = kinds[0] if len(kinds) == 1 else None
    return keys, kinds, own


def sections(annotation: Any) -> Iterator[Any]:
    """The sections in a type such as `Annotated[A | B, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)
