"""What the tokens of an imported prompt mean: earlier tools left some out that the model's pass has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from craft_ray.models.tokens import clip_suffix


@dataclass(frozen=True)
class Reading:
    """How stored tokens become a model's: what was left out is put back."""

    words: str
    """What is put back, for the user; empty if nothing is."""
    at: int = 0
    """The token before which `inserted` is put."""
    inserted: tuple[int, ...] = ()
    appended: tuple[int, ...] = ()
    leading: tuple[int, ...] = ()
    """Suffix tokens that are given, before those that are predicted."""
    stop: int | None = None
    """The token that ends a suffix; what was stored after it is left out."""

    def prompt(self, ids_S: np.ndarray) -> np.ndarray:
        parts = (ids_S[: self.at], self.inserted, ids_S[self.at :], self.appended)
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])

    def suffix(self, tokens: Sequence[int]) -> list[int]:
        stops = () if self.stop is None else (self.stop,)
        return [*self.leading, *clip_suffix(tokens, stops)]


AS_STORED = Reading("")
