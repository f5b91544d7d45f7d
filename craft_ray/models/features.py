"""Preprocessed samples kept in memory: they come back every few steps, and decoding an image is dear."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from craft_ray.models.base import Features

FEATURE_CACHE_BYTES = 1 << 30
SOURCES = 4
"""Sources of a run: task, anchors, and held-out data of both skills."""

Key = TypeVar("Key", bound=Hashable)


class FeatureCache(Generic[Key]):
    """Features by key (a row, mostly), kept while they fit."""

    def __init__(self, make: Callable[[Key], Features], shelf: Shelf | None = None) -> None:
        """
        Args:
            shelf: where features stand already, and those that are made are put; an own one where it is None.
        """
        self._make = make
        self._shelf = shelf or Shelf()

    def __getitem__(self, key: Key) -> Features:
        found = self._shelf.kept.get(key)
        if found is None:
            found = self._make(key)
            if found.nbytes <= self._shelf.room.left:
                self._shelf.room.left -= found.nbytes
                self._shelf.kept[key] = found
        return found


@dataclass
class Room:
    """Bytes that are left for features."""

    left: int = FEATURE_CACHE_BYTES


@dataclass
class Shelf:
    """Features that are kept, and the room for more, which several may share."""

    kept: dict[Any, Features] = field(default_factory=dict)
    room: Room = field(default_factory=Room)


class Shelves:
    """What runs one after the other in a process leave to each other: a shelf for each way to read a source, and room
    for all of them together."""

    def __init__(self) -> None:
        self._shelves: dict[str, Shelf] = {}
        self._room = Room(SOURCES * FEATURE_CACHE_BYTES)

    def of(self, *how: str) -> Shelf:
        """The shelf of a source, named by all that its features depend on."""
        return self._shelves.setdefault("\n".join(how), Shelf(room=self._room))
