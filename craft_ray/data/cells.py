"""The text of a cell, and how a value is quoted in a message."""

from __future__ import annotations

import datetime
import math
import reprlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from craft_ray.errors import DataError

LONGEST = 100
"""Characters of a value that a message quotes."""
NUMBERS = (int, float, Decimal)
DATES = (datetime.date, datetime.time)

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = LONGEST


class WrittenFloat(float):
    """A fraction with the text of its file: 1.10 is not 1.1 there."""

    __slots__ = ("written",)
    written: str

    def __new__(cls, written: str) -> WrittenFloat:
        self = super().__new__(cls, written)
        self.written = written
        return self


def shown(value: Any) -> str:
    """A value as Python writes it, cut to what a line of a message can hold."""
    if isinstance(value, str | bytes):
        unit = "characters" if isinstance(value, str) else "bytes"
        rest = "" if len(value) <= LONGEST else f"... ({len(value)} {unit})"
        return f"{value[:LONGEST]!r}{rest}"
    if isinstance(value, WrittenFloat):
        return value.written
    return cut(_brief.repr(value))


def cut(text: str, longest: int = 3 * LONGEST) -> str:
    """The start of a text written by others, such as a library's message or a list of columns, and printable."""
    head = text[:longest].encode("utf-8", "backslashreplace").decode("utf-8")
    return head if len(text) <= longest else f"{head}... ({len(text)} characters)"


def without_nulls(value: Any) -> Any:
    """A value whose mappings, at any depth, have no key that holds nothing. The members of lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def text_of(value: Any, where: str, column: str, classes: Mapping[str, Sequence[str]]) -> str:
    """A cell as text. A number is what the file says: the characters of JSON lines and CSV; in a typed table the
    shortest digits that identify it.

    Args:
        where: names the row in an error.
        column: the reference to the value.
        classes: the names that integers stand for, by the reference to them.

    Raises:
        DataError: the cell is empty, or neither text nor a number or date.
    """
    holds = f"{where}: column '{column}' holds"
    if isinstance(value, str):
        refuse_halves(value, holds)
        return value
    if value is None or (isinstance(value, float | Decimal) and not math.isfinite(value)):
        raise DataError(f"{holds} {shown(value)}; fix or remove the row")
    if isinstance(value, bool) or not isinstance(value, NUMBERS + DATES):
        turns = "; a conversation is named by columns.messages" if isinstance(value, list) else ""
        raise DataError(
            f"{holds} {shown(value)} ({_kind(value)}); text is expected: specify a column of text, or write the text "
            f"that is meant into one{turns}"
        )
    if column in classes:
        return _class_name(value, holds, classes[column])
    return value.written if isinstance(value, WrittenFloat) else str(value)


def refuse_halves(value: Any, holds: str) -> None:
    """Refuse half a character (a lone surrogate), which no tokenizer takes, in text or anywhere within lists and
    mappings.

    Args:
        holds: the start of the message: what holds the value.

    Raises:
        DataError: there is one.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise DataError(
                f"{holds} {shown(value)} with {half!r}, half of a character; fix or remove the row"
            ) from None
    elif isinstance(value, Mapping):
        for pair in value.items():
            refuse_halves(pair, holds)
    elif isinstance(value, list | tuple):
        for part in value:
            refuse_halves(part, holds)


def _class_name(value: Any, holds: str, names: Sequence[str]) -> str:
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise DataError(f"{holds} {shown(value)}, but its classes are 0 to {len(names) - 1}; fix or remove the row")
    return names[value]


def _kind(value: Any) -> str:
    """The type of a value in the words of a user."""
    names = {bool: "true or false", list: "a list", dict: "a mapping", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def index_of(value: Any, count: int, where: str, column: str) -> int:
    """A cell as the position of one of `count` choices.

    Raises:
        DataError: it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise DataError(
            f"{where}: column '{column}' holds {shown(value)}; the position of the right one among its {count} choices "
            f"is expected, a whole number from 0"
        )
    return value
