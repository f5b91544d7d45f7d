"""The feature cache: preprocessed samples in memory. They return every few steps, and decoding is expensive."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import TypeVar

from craft_ray.models.base import Features

LIMIT_BYTES = 4 << 30
"""Shared by all sources of a run: task, anchors, and the held-out data of both skills."""

Key = TypeVar("Key", bound=Hashable)


class FeatureCache:
    """Features of samples, kept while they fit. Consecutive runs in a process may share one cache."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._left = limit_bytes
        self._lock = Lock()  # rows are checked in several threads
        self._sources: dict[tuple[str, ...], dict[Hashable, Features]] = {}

    def source(self, make: Callable[[Key], Features], *identity: str) -> Callable[[Key], Features]:
        """`make` with its results cached: from the key of a sample (mostly its row) to its features.

        Args:
            identity: everything that the features depend on besides the key; sources of equal identity share them.
        """
        kept = self._sources.setdefault(identity, {})

        def features(key: Key) -> Features:
            found = kept.get(key)
            if found is None:
                found = make(key)
                with self._lock:
                    if key not in kept and found.nbytes <= self._left:
                        self._left -= found.nbytes
                        kept[key] = found
            return found

        return features
