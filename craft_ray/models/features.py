"""The feature cache: preprocessed samples in memory. They return every few steps, and decoding is expensive."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, field
from threading import Lock
from typing import Generic, TypeVar

from craft_ray.models.base import Features
from craft_ray.models.loader import Loader

LIMIT_BYTES = 4 << 30
"""Shared by all sources of a run: task, anchors, and the held-out data of both skills."""

Key = TypeVar("Key", bound=Hashable)


@dataclass
class _Kept:
    """What the views of one cache share."""

    left: int
    """Bytes that still fit."""
    lock: Lock = field(default_factory=Lock)
    """Rows are checked in several threads."""
    sources: dict[tuple[str, ...], dict[Hashable, Features]] = field(default_factory=dict)


class FeatureCache:
    """Features of samples, kept while they fit. Consecutive runs in a process may share one cache."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._kept = _Kept(limit_bytes)
        self._loader: Loader | None = None

    def with_loaders(self, count: int) -> FeatureCache:
        """The same cache for a run whose batches are made by this many processes; it has to be closed."""
        view = copy(self)
        view._loader = Loader(count) if count else None
        return view

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def source(self, make: Callable[[Key], Features], *identity: str) -> FeatureSource[Key]:
        """`make` with its results cached: from the key of a sample (mostly its row) to its features.

        Args:
            identity: everything that the features depend on besides the key; sources of equal identity share them.
        """
        return FeatureSource(make, self._kept, self._kept.sources.setdefault(identity, {}), self._loader)


class FeatureSource(Generic[Key]):
    """The features of one source, by key."""

    def __init__(
        self,
        make: Callable[[Key], Features],
        kept: _Kept,
        found: dict[Hashable, Features],
        loader: Loader | None,
    ) -> None:
        self._make, self._kept, self._found, self._loader = make, kept, found, loader

    def __call__(self, key: Key) -> Features:
        found = self._found.get(key)
        if found is None:
            found = self._make(key)
            self._keep(key, found)
        return found

    def batch(self, keys: Sequence[Key]) -> list[Features]:
        """The features of several samples; the processes of a loader make those that are not kept."""
        if self._loader is None:
            return [self(key) for key in keys]
        found = {key: self._found[key] for key in keys if key in self._found}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        for key, features in zip(missing, self._loader.map(self._make, missing), strict=True):
            self._keep(key, features)
            found[key] = features
        return [found[key] for key in keys]

    def _keep(self, key: Key, features: Features) -> None:
        with self._kept.lock:
            if key not in self._found and features.nbytes <= self._kept.left:
                self._kept.left -= features.nbytes
                self._found[key] = features
