"""The metrics of a run as TensorBoard events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from craft_ray.run.metrics import Record
from craft_ray.run.observers import Observer


class TensorBoardObserver:
    """Writes each record as events, and passes everything on to another observer."""

    def __init__(self, folder: Path, inner: Observer, enabled: bool) -> None:
        self.inner = inner
        self._folder = folder if enabled else None
        self._writer: SummaryWriter | None = None

    def note(self, text: str) -> None:
        self.inner.note(text)

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        self.inner.progress(what, done, total, left_s)

    def steps(self, records: Sequence[Record]) -> None:
        if records:
            self._write(records, purge=records[0]["step"])
        self.inner.steps(records)

    def validated(self, record: Record) -> None:
        self._write([record], purge=record["step"] + 1)  # the step itself was logged before the validation
        self.inner.validated(record)

    def _write(self, records: Sequence[Record], purge: int) -> None:
        if self._folder is None:
            return
        if self._writer is None:
            # A resumed run writes some steps again; their earlier events are purged.
            self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        for record in records:
            for key, value in record.items():
                if key != "step" and value is not None:
                    self._writer.add_scalar(key, float(value), record["step"])

    def done(self, result: dict[str, Any]) -> None:
        self.inner.done(result)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
