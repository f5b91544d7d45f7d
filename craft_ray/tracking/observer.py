"""An observer of a run that logs to trackers what it is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from craft_ray.errors import Interrupted, StorageError
from craft_ray.tracking.content import flatten
from craft_ray.tracking.tracker import Status, TrackedRun

if TYPE_CHECKING:
    from craft_ray.run.metrics import Record
    from craft_ray.run.observers import Observer


class TrackingObserver:
    """Logs what it is told to tracked runs, and passes everything on to another observer. Ends the runs on leaving.

    A tracker that stops working costs its own numbers, not the training: it is told once and dropped.
    """

    def __init__(self, inner: Observer, runs: Sequence[TrackedRun]) -> None:
        self.inner = inner
        self._runs = list(runs)
        self._step = 0

    def note(self, text: str) -> None:
        self.inner.note(text)

    def steps(self, records: Sequence[Record]) -> None:
        self.inner.steps(records)
        self._log(records)

    def validated(self, record: Record) -> None:
        self.inner.validated(record)
        self._log([record])

    def done(self, result: dict[str, Any]) -> None:
        """The numbers of the result are logged at its last step as `result/...`."""
        self.inner.done(result)
        numbers = {
            "result/" + key.replace(".", "/"): value
            for key, value in flatten(result).items()
            if isinstance(value, int | float)
        }
        self._log([{"step": result["steps"], **numbers}])

    def _log(self, records: Sequence[Record]) -> None:
        for run in list(self._runs):
            with self._surviving(run):
                run.log(records)

    @contextmanager
    def _surviving(self, run: TrackedRun) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            self._runs.remove(run)
            self.inner.note(f"{error.message}; the run goes on without it, the run folder has all numbers")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status: Status = "finished"
        if kind is not None:
            status = "stopped" if issubclass(kind, KeyboardInterrupt | Interrupted) else "failed"
        for run in list(self._runs):
            with self._surviving(run):
                run.end(status)
