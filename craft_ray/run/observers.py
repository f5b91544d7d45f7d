"""What observes the progress of a run: the console, or a file that the console follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from craft_ray.run.metrics import Record


class Observer(Protocol):
    """Receives each event of a run."""

    def note(self, text: str) -> None: ...

    def checking(self, key: str, done: int, rows: int, left_s: float) -> None:
        """Rows of the data under a key that are checked, of how many, and about how long the others take: 0 at the end.
        A check that takes no time says nothing."""
        ...

    def steps(self, records: Sequence[Record]) -> None: ...

    def validated(self, record: Record) -> None: ...

    def done(self, result: dict[str, Any]) -> None: ...


class NullObserver:
    """Ignores every event."""

    def note(self, text: str) -> None: ...

    def checking(self, key: str, done: int, rows: int, left_s: float) -> None: ...

    def steps(self, records: Sequence[Record]) -> None: ...

    def validated(self, record: Record) -> None: ...

    def done(self, result: dict[str, Any]) -> None: ...
