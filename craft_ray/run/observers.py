"""What observes the progress of a run: the console, or a file that the console follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from craft_ray.run.metrics import Record


class Observer(Protocol):
    """Receives each event of a run."""

    def note(self, text: str) -> None: ...

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        """How many rows, or other parts, of some work are done, of how many, and about how long the others take: 0 at
        the end. Work that takes no time reports nothing."""
        ...

    def steps(self, records: Sequence[Record]) -> None: ...

    def validated(self, record: Record) -> None: ...

    def done(self, result: dict[str, Any]) -> None: ...


class NullObserver:
    """Ignores every event."""

    def note(self, text: str) -> None: ...

    def progress(self, what: str, done: float, total: int, left_s: float) -> None: ...

    def steps(self, records: Sequence[Record]) -> None: ...

    def validated(self, record: Record) -> None: ...

    def done(self, result: dict[str, Any]) -> None: ...
