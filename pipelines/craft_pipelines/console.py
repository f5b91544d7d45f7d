"""What a user sees while a stage runs: plain lines in a log, a bar on a terminal.

A Ray worker writes its messages into a file in the run folder, and the driver follows that file. Ray's own forwarding
would put the process in front of every line.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from craft_ray.run.metrics import Record, console_line, result_lines, validation_line
from craft_ray.run.observers import Observer
from craft_ray.storage.files import append_text
from craft_ray.storage.paths import ObjectPath, StoragePath

POLL_S = 0.1
LINE_S = 10.0
"""Time between two lines about rows that are checked."""
STORE_POLL_S = 1.0
"""In an object store, where each poll is a request."""


class RowsProgress:
    """How far a check of rows is: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._bar: TaskID | None = None
        self._next_line = time.monotonic() + LINE_S

    def show(self, key: str, done: int, rows: int, left_s: float) -> None:
        if self._bars is not None:
            if self._bar is None:
                self._bar = self._bars.add_task(f"checking the rows of {key}", total=rows)
            self._bars.update(self._bar, completed=done)
            if not left_s:
                self._bars.remove_task(self._bar)
                self._bar = None
        elif left_s and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + LINE_S
            _line(f"checking the rows of {key}: {done} of {rows}, about {readable_seconds(left_s)} left")


def readable_seconds(seconds: float) -> str:
    """A duration in words: 40 s, 3 min, 2.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


@contextmanager
def bars() -> Iterator[Progress | None]:
    """Progress bars below what is printed; none where no terminal shows them."""
    if not sys.stdout.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(highlight=False), transient=True) as progress:
        yield progress


class ConsoleObserver:
    """Prints notes and steps; on a terminal with a progress bar below them."""

    def __init__(self, steps: int, mode: str) -> None:
        self.total = steps
        self.mode = mode
        self._open = ExitStack()
        self._progress = self._open.enter_context(bars())
        if self._progress is not None:
            self._bar = self._progress.add_task(mode, total=steps)
        self._rows = RowsProgress(self._progress)

    def note(self, text: str) -> None:
        self._print(text)

    def checking(self, key: str, done: int, rows: int, left_s: float) -> None:
        self._rows.show(key, done, rows, left_s)

    def steps(self, records: Sequence[Record]) -> None:
        """Print a line for the last step: the log has a line every `train.log_every` steps, the file has all steps."""
        self._print(console_line(records, self.total, self.mode))
        if self._progress is not None:
            self._progress.update(self._bar, completed=records[-1]["step"])

    def validated(self, record: Record) -> None:
        self._print(validation_line(record, self.total))

    def done(self, result: dict[str, Any]) -> None:
        for line in result_lines(result):
            self._print(line)

    def close(self) -> None:
        self._open.close()

    def _print(self, text: str) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, soft_wrap=True)
        else:
            _line(text)


class QuarterObserver:
    """Prints one run among several: a line after each quarter of its steps, and one at the end."""

    def __init__(self, label: str, steps: int, mode: str) -> None:
        self.label = label
        self.total = steps
        self.mode = mode
        self._quarter = 0

    def note(self, text: str) -> None:
        pass

    def checking(self, key: str, done: int, rows: int, left_s: float) -> None:
        pass

    def steps(self, records: Sequence[Record]) -> None:
        quarter = 4 * records[-1]["step"] // self.total
        if quarter > self._quarter:
            self._quarter = quarter
            _line(f"[{self.label}] {console_line(records, self.total, self.mode)}")

    def validated(self, record: Record) -> None:
        pass

    def done(self, result: dict[str, Any]) -> None:
        _line(f"[{self.label}] " + "; ".join(result_lines(result)))


class FileObserver:
    """Writes the messages of an observer as JSON lines."""

    def __init__(self, path: StoragePath) -> None:
        self.path = path

    def note(self, text: str) -> None:
        self._append({"note": text})

    def checking(self, key: str, done: int, rows: int, left_s: float) -> None:
        self._append({"checking": [key, done, rows, left_s]})

    def steps(self, records: Sequence[Record]) -> None:
        self._append({"steps": list(records)})

    def validated(self, record: Record) -> None:
        self._append({"validated": record})

    def done(self, result: dict[str, Any]) -> None:
        self._append({"done": result})

    def _append(self, message: dict[str, Any]) -> None:
        append_text(self.path, json.dumps(message) + "\n")


@contextmanager
def following(path: StoragePath, observer: Observer) -> Iterator[None]:
    """Pass to `observer` what a `FileObserver` in another process writes into `path`, while the body runs."""
    path.unlink(missing_ok=True)
    done = threading.Event()

    def follow() -> None:
        position, ended = 0, False
        poll_s = STORE_POLL_S if isinstance(path, ObjectPath) else POLL_S
        while not ended:
            ended = done.wait(poll_s)  # the file is read once more after the end
            if not path.exists():
                continue
            with path.open("rb") if isinstance(path, Path) else path.open_input() as file:
                file.seek(position)
                *lines, rest = file.read().split(b"\n")
                position = file.tell() - len(rest)
            for line in lines:
                message = json.loads(line)
                if "note" in message:
                    observer.note(message["note"])
                elif "checking" in message:
                    observer.checking(*message["checking"])
                elif "validated" in message:
                    observer.validated(message["validated"])
                elif "done" in message:
                    observer.done(message["done"])
                else:
                    observer.steps(message["steps"])

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)


def _line(text: str) -> None:
    """Write a line at once: several runs are followed in parallel, and `print` writes the newline separately."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
