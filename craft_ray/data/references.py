"""How a config refers to data: by a column, a value within one, or a text made from several.

question                      the column of that name, whatever characters it has
answer.text, turns.0.value    a value within a column of mappings and lists, unless a column has that name
{question}\n{context}         a text with values in braces, unless a column has that name; {{ and }} are braces
"""

from __future__ import annotations

from collections.abc import Collection
from string import Formatter
from typing import Any


def within(reference: str, present: Collection[str]) -> list[str]:
    """The references in braces of a template, in their order; the reference itself if it is not a template.

    Raises:
        ValueError: its braces do not match.
    """
    if reference in present or "{" not in reference:
        return [reference]
    return [name for _, name, _, _ in Formatter().parse(reference) if name is not None]


def candidates(reference: str) -> list[str]:
    """The columns that a reference may read, before it is known which columns there are."""
    found = [reference]
    if "{" in reference:
        try:
            found += within(reference, ())
        except ValueError:
            return found
    return list(dict.fromkeys([*found, *(name.split(".")[0] for name in found)]))


def column_of(reference: str, present: Collection[str]) -> str:
    """The column that holds what one reference names."""
    return reference if reference in present else reference.split(".")[0]


def value_at(cells: dict[str, Any], reference: str) -> Any:
    """The value that a reference names.

    Raises:
        KeyError: the value within the column is not there; it says which part.
    """
    if reference in cells:
        return cells[reference]
    first, *path = reference.split(".")
    value = cells.get(first)
    for part in path:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(part)
    return value


def filled(template: str, values: dict[str, str]) -> str:
    """A template with its values."""
    parts = (text + ("" if name is None else values[name]) for text, name, _, _ in Formatter().parse(template))
    return "".join(parts)
