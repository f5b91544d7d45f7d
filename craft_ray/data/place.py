"""Where a row is, as every message names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A row by what the user can look up, whatever part of a split, mixture or folder is read."""

    holder: str
    """The source, with the file if it has several."""
    row: str
    """The row there: `row 93`, counted from 0."""

    def __str__(self) -> str:
        return f"{self.holder}, {self.row}"


def listed(places: Iterable[Place], after: Place) -> str:
    """A list of places, in a message that has just named `after`; a holder is named where it changes."""
    names, holder = [], after.holder
    for place in places:
        names.append(place.row if place.holder == holder else str(place))
        holder = place.holder
    return "; ".join(names)
