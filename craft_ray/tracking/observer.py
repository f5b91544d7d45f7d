"""An observer of a run that logs its events to trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from craft_ray.errors import StorageError
from craft_ray.tracking.content import flatten
from craft_ray.tracking.tracker import Status, TrackedRun

if TYPE_CHECKING:
    from craft_ray.run.metrics import Record
    from craft_ray.run.observers import Observer


class TrackingObserver:
    """Logs each event to tracked runs, passes everything on to another observer, and ends the tracked runs on exit.

    A tracker that stops working loses its metrics but does not stop the training: it is reported once and dropped.
    """

    def __init__(self, inner: Observer, runs: Sequence[TrackedRun], say: Callable[[str], None] | None = None) -> None:
        """
        Args:
            say: receives the report, in place of `inner`.
        """
        self.inner = inner
        self._say = say or inner.note
        self._runs = list(runs)
        self._step = 0

    def note(self, text: str) -> None:
        self.inner.note(text)

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        self.inner.progress(what, done, total, left_s)

    def steps(self, records: Sequence[Record]) -> None:
        self.inner.steps(records)
        self._log(records)

    def validated(self, record: Record) -> None:
        self.inner.validated(record)
        self._log([record])

    def done(self, result: dict[str, Any]) -> None:
        """Log the numbers of the result at its last step as `result/...`; the run has ended, whatever others do."""
        self.inner.done(result)
        numbers = {
            "result/" + key.replace(".", "/"): value
            for key, value in flatten(result).items()
            if isinstance(value, int | float)
        }
        self._log([{"step": result["steps"], **numbers}])
        self._end("finished")

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
            self._say(f"{error.message}; the run continues without it, the run folder has all metrics")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status: Status = "finished"
        if kind is not None:
            status = "stopped" if issubclass(kind, KeyboardInterrupt) else "failed"
        self._end(status)

    def _end(self, status: Status) -> None:
        for run in list(self._runs):
            with self._surviving(run):
                run.end(status)
        self._runs.clear()
