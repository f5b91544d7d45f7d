"""The types of fields, and the base class of every section of a config."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

ARMS = ("baseline", "token_ce", "hidden")
MOST_VARIANTS = 25
"""As many as a report can distinguish by colour and marker."""
Precision = Literal["fp32", "bf16"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Torch takes no larger one."""
SmallSeed = Annotated[int, Field(ge=0, lt=2**32)]
"""NumPy's older generators, which samplers and simulators use, take no larger one."""
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

BOUND = re.compile(r"\s*(>=|<=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
POSITIONS = ("vision_mean", "text_last", "masked_mean", "first_token", "last_token", "all", "every_N", "suffix")
EARLIER_POSITIONS = {
    "vision_token_mean": "vision_mean",
    "mean_image_tokens": "vision_mean",
    "text_token_last": "text_last",
    "mean_masked": "masked_mean",
    "cls_token": "first_token",
}
"""Names of positions in the tools that preceded this one (docs/migration.md)."""


def current_position(name: str) -> str:
    """The name of a position here; one that has no earlier name stays as it is."""
    return EARLIER_POSITIONS.get(name, name)


def _position(name: str) -> str:
    name = current_position(name)
    if (name in POSITIONS and name != "every_N") or re.fullmatch(r"every_[1-9]\d*", name):
        return name
    raise ValueError(f"'{name}' is not an anchor position; the positions are {', '.join(POSITIONS)} (N a number)")


def _bound(text: Any) -> Any:
    if isinstance(text, str) and BOUND.fullmatch(text):
        return text
    raise ValueError(f"'{text}' is not a bound: write '>= 0.95' or '<= 0.05'")


def _episodes(value: Any) -> Any:
    """Numbers, or ranges such as "0-39", as numbers."""
    numbers: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        part = re.fullmatch(r"(\d+)-(\d+)", item) if isinstance(item, str) else None
        if isinstance(item, str) and (part is None or int(part[1]) > int(part[2])):
            raise ValueError(f"'{item}' is not a range of episodes: write the first and the last, e.g. 0-39")
        numbers += [item] if part is None else range(int(part[1]), int(part[2]) + 1)
    return numbers


def distinct(items: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if items is not None and (not items or len(set(items)) != len(items)):
        raise ValueError(f"{list(items)} must have at least one entry, and each entry only once")
    return items


def workers(value: Any) -> Any:
    """A number of workers, or the minimum and the maximum."""
    pair = value if isinstance(value, list | tuple) else (value, value)
    if not all(type(number) is int for number in pair) or len(pair) != 2:
        raise ValueError(f"{value!r} is not a number of workers: write e.g. 2, or [1, 2] for a minimum and a maximum")
    least, most = pair
    if pair is value and not 1 <= least <= most:
        raise ValueError(
            f"[{least}, {most}] is not a range of workers: write a minimum, from 1, and a maximum, e.g. [1, 2]"
        )
    if least < 0:
        raise ValueError(f"{value} is not a number of workers: write 0 to train in this process, or 1 or more")
    return value


def checked_name(name: str, what: str, taken: Collection[str], meaning: str) -> str:
    """A name that a user gives in a config.

    Args:
        what: what is named.
        taken: names that have a meaning already.
    """
    if name in taken:
        raise ValueError(f"'{name}' is {meaning}: choose another name for the {what}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"'{name}' is not a name of a {what}: use lower-case letters, digits and _, starting with a letter"
        )
    return name


def _variant(name: str) -> str:
    return checked_name(name, "variant", ARMS, "the name of an arm")


Position = Annotated[str, AfterValidator(_position)]
VariantName = Annotated[str, AfterValidator(_variant)]
Positions = Annotated[tuple[Position, ...] | None, AfterValidator(distinct)]
Bound = Annotated[str, BeforeValidator(_bound)]
Episodes = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...] | None,
    AfterValidator(distinct),
    BeforeValidator(
        lambda value: None if value is None else _episodes(value),
        json_schema_input_type=int | str | list[int | str] | None,
    ),
]
Layers = Annotated[tuple[int, ...] | None, AfterValidator(distinct)]


def _of_numbers(annotation: Any) -> bool:
    """Whether a field holds numbers, or several of them, and no truth values."""
    types = set(_members(annotation))
    return bool(types & {int, float}) and bool not in types


def _members(annotation: Any) -> Iterator[Any]:
    """The types that values have by an annotation, alone or in a tuple."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType, tuple):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, section: Any) -> Any:
        """Refuse a truth value where a number is meant: pydantic takes true for 1."""
        for key, value in section.items() if isinstance(section, Mapping) else ():
            field = cls.model_fields.get(key)
            values = value if isinstance(value, list | tuple) else [value]
            truths = [str(item).lower() for item in values if isinstance(item, bool)]
            if truths and field is not None and _of_numbers(field.annotation):
                raise ValueError(f"{key} is {truths[0]}, which is not a number: specify one")
        return section
