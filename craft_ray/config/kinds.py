"""Sections of several kinds: unions of models, so that the type refuses a key of another kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic.fields import FieldInfo

from craft_ray.config.types import Section


class Kind(Section):
    """One kind of a section."""

    key: ClassVar[str]
    """The field that selects the kind of a section."""
    tags: ClassVar[tuple[str, ...]]
    """The values of that field for this kind."""
    noun: ClassVar[str]
    """The name of the kind in a message."""

    @classmethod
    def described(cls) -> str:
        return f"{cls.noun} ({cls.key}: {', '.join(cls.tags)})"


def without_unused(tree: Mapping[str, Any], own: type[Kind], kinds: Sequence[type[Kind]]) -> dict[str, Any]:
    """A section without keys of other kinds that are null or at their defaults. Configs from the time when the kinds
    were one section have all keys of all kinds."""
    return {key: value for key, value in tree.items() if key in own.model_fields or not _unused(key, value, kinds)}


def _unused(key: str, value: Any, kinds: Sequence[type[Kind]]) -> bool:
    return any(_at_default(kind.model_fields[key], value) for kind in kinds if key in kind.model_fields)


def _at_default(field: FieldInfo, value: Any) -> bool:
    if isinstance(field.default, Section) and isinstance(value, Mapping):
        default = field.default.model_dump()
        return default | dict(value) == default
    return value is None or bool(value == field.default)
