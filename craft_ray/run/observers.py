"""Who is told how a run goes: the console, or a file that the console follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from craft_ray.run.metrics import Record


class Observer(Protocol):
    """Is told of each event of a run."""

    def note(self, text: str) -> None: ...

    def steps(self, records: Sequence[Record]) -> None: ...

    def validated(self, record: Record) -> None: ...

    def done(self, result: dict[str, Any]) -> None: ...


class NullObserver:
    """Nobody is told."""

    def note(self, text: str) -> None: ...

    def steps(self, records: Sequence[Record]) -> None: ...

    def validated(self, record: Record) -> None: ...

    def done(self, result: dict[str, Any]) -> None: ...
