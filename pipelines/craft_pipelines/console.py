"""What a user sees while a stage runs: plain lines in a log, a bar on a terminal.

A Ray worker writes its messages into a file in the run folder, and the driver follows that file. Ray's own forwarding
would put the process in front of every line.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from craft_ray.background import in_background
from craft_ray.errors import StorageError
from craft_ray.run.metrics import Record, console_line, result_lines, retention_step, validation_line
from craft_ray.run.observers import Observer
from craft_ray.storage.files import append_text
from craft_ray.storage.paths import ObjectPath, StoragePath

POLL_S = 0.1
LINE_S = 10.0
"""Time before the first line about work that takes long."""
LINE_PART = 0.5
"""Part of the time that the work has taken, before the next line."""
STORE_POLL_S = 1.0
"""In an object store, where each poll is a request."""


def readable_seconds(seconds: float) -> str:
    """A duration in words: 40 s, 3 min, 2.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


class Screen:
    """Lines, and how far work is that takes long: a bar on a terminal, elsewhere a line now and then.

    Args:
        bars: what draws bars below the lines; None if no terminal shows them.
    """

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._drawn: dict[str, TaskID] = {}
        self._lines: dict[str, tuple[float, float]] = {}
        """When the work began, and when its next line is due."""

    def line(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, markup=False, soft_wrap=True)
        else:
            line(text)

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        """As `Observer.progress`."""
        self.bar(what, done, total)
        now = time.monotonic()
        began, due = self._lines.setdefault(what, (now, now + LINE_S))
        if not left_s:
            del self._lines[what]
            if what in self._drawn and self._bars is not None:
                self._bars.remove_task(self._drawn.pop(what))
        elif self._bars is None and now > due:
            self._lines[what] = (began, now + max(LINE_S, LINE_PART * (now - began)))
            line(f"{what}: {int(done)} of {total}, about {readable_seconds(left_s)} left")

    def bar(self, what: str, done: float, total: int) -> None:
        """Only a bar, for work that prints its own lines."""
        if self._bars is not None:
            if what not in self._drawn:
                self._drawn[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._drawn[what], completed=done)


@contextmanager
def screen() -> Iterator[Screen]:
    """What a stage prints on, with bars where a terminal shows them."""
    if not sys.stdout.isatty():
        yield Screen(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(highlight=False), transient=True) as progress:
        yield Screen(progress)


class ConsoleObserver:
    """Prints notes and steps; on a terminal with a progress bar below them."""

    def __init__(self, steps: int, mode: str) -> None:
        self.total = steps
        self.mode = mode
        self._retention: Record | None = None
        self._open = ExitStack()
        self._screen = self._open.enter_context(screen())
        self._screen.bar(mode, 0, steps)

    def note(self, text: str) -> None:
        self._screen.line(text)

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        self._screen.progress(what, done, total, left_s)

    def steps(self, records: Sequence[Record]) -> None:
        """Print a line for the last step: the log has a line every `train.log_every` steps, the file has all steps."""
        self._screen.line(console_line(records, self.total, self.mode, self._retention))
        self._retention = retention_step(records, self._retention)
        self._screen.bar(self.mode, records[-1]["step"], self.total)

    def validated(self, record: Record) -> None:
        self._screen.line(validation_line(record, self.total))

    def done(self, result: dict[str, Any]) -> None:
        for line in result_lines(result):
            self._screen.line(line)

    def close(self) -> None:
        self._open.close()


class Notes:
    """What several runs note: each text once, under the name of the run that says it first. Runs of one config on the
    same data note mostly the same."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def add(self, label: str, text: str) -> None:
        with self._lock:
            if text in self._said:
                return
            self._said.add(text)
        self._say(f"[{label}] {text}")


class Together:
    """The steps of several runs as one bar, and their notes; each run reports from its own thread."""

    def __init__(self, screen: Screen, runs: int, steps: int) -> None:
        self.screen = screen
        self.notes = Notes(screen.line)
        self._what, self._steps, self._done = f"{runs} runs, steps", steps, 0
        self._lock = threading.Lock()
        screen.bar(self._what, 0, steps)

    def add(self, steps: int) -> None:
        with self._lock:
            self._done += steps
            self.screen.bar(self._what, self._done, self._steps)


class QuarterObserver:
    """Prints one run among several: its notes, a line after each quarter of its steps, and one at the end."""

    def __init__(self, label: str, steps: int, mode: str, together: Together) -> None:
        self.label = label
        self.total = steps
        self.mode = mode
        self._quarter = self._step = 0
        self._retention: Record | None = None
        self._together = together
        self._screen = together.screen

    def note(self, text: str) -> None:
        self._together.notes.add(self.label, text)

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        self._screen.progress(f"[{self.label}] {what}", done, total, left_s)

    def steps(self, records: Sequence[Record]) -> None:
        self._together.add(records[-1]["step"] - self._step)
        self._step = records[-1]["step"]
        quarter = 4 * self._step // self.total
        if quarter > self._quarter:
            self._quarter = quarter
            line = console_line(records, self.total, self.mode, self._retention)
            self._screen.line(f"[{self.label}] {line}")
        self._retention = retention_step(records, self._retention)

    def validated(self, record: Record) -> None:
        pass

    def done(self, result: dict[str, Any]) -> None:
        self._screen.line(f"[{self.label}] " + "; ".join(result_lines(result)))


class FileObserver:
    """Writes the messages of an observer as JSON lines."""

    def __init__(self, path: StoragePath) -> None:
        self.path = path

    def note(self, text: str) -> None:
        self._append({"note": text})

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        self._append({"progress": [what, done, total, left_s]})

    def steps(self, records: Sequence[Record]) -> None:
        self._append({"steps": list(records)})

    def validated(self, record: Record) -> None:
        self._append({"validated": record})

    def done(self, result: dict[str, Any]) -> None:
        self._append({"done": result})

    def _append(self, message: dict[str, Any]) -> None:
        append_text(self.path, json.dumps(message) + "\n")


class Messages:
    """What a `FileObserver` in another process writes into a file, as it grows."""

    def __init__(self, path: StoragePath) -> None:
        """Forget what an earlier process has written."""
        self.path = path
        self.poll_s = STORE_POLL_S if isinstance(path, ObjectPath) else POLL_S
        self._position = 0
        path.unlink(missing_ok=True)

    def pass_to(self, observer: Observer) -> None:
        """Pass on what has come since the last look."""
        try:
            if not self.path.exists():
                return
            with self.path.open("rb") if isinstance(self.path, Path) else self.path.open_input() as file:
                file.seek(self._position)
                *lines, rest = file.read().split(b"\n")
                self._position = file.tell() - len(rest)
        except (OSError, StorageError):  # the next look may succeed
            return
        for line in lines:
            message = json.loads(line)
            if "note" in message:
                observer.note(message["note"])
            elif "progress" in message:
                observer.progress(*message["progress"])
            elif "validated" in message:
                observer.validated(message["validated"])
            elif "done" in message:
                observer.done(message["done"])
            else:
                observer.steps(message["steps"])

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


@contextmanager
def following(path: StoragePath, observer: Observer) -> Iterator[None]:
    """Pass to `observer` what a `FileObserver` in another process writes into `path`, while the body runs."""
    messages = Messages(path)

    def follow(done: threading.Event) -> None:
        ended = False
        while not ended:
            ended = done.wait(messages.poll_s)
            messages.pass_to(observer)  # once more after the end

    try:
        with in_background(follow):
            yield
    finally:
        messages.end()


def line(text: str) -> None:
    """Write a line at once: several runs are followed in parallel, and `print` writes the newline separately."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
