"""How many anchors of a build its teachers have run on.

The teachers are in other processes, perhaps on other machines, and a shard takes them a long time. They report
how far they are through the key-value store that Ray keeps for a cluster, which takes no process of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from ray.experimental import internal_kv

from craft_ray.background import in_background
from craft_ray.pace import Pace, Report

NAMESPACE = "craft-ray"
POLL_S = 1.0
"""Between two looks at the store, and between two messages of a teacher."""


class BuildProgress:
    """Adds up what the teachers report, and reports it as rows of the whole cache.

    Args:
        written: rows in shards of earlier builds.
        ran: receives the rows that are done, those of earlier builds included.
    """

    def __init__(self, rows: int, written: int, report: Report, ran: Callable[[float], None] = lambda _: None) -> None:
        self._rows, self._report, self._ran = rows, report, ran
        self._written: float = written
        self._passed: dict[str, float] = {}
        self._finished: set[str] = set()
        self._pace: Pace | None = None
        self._lock = threading.Lock()

    def passed(self, name: str, rows: float) -> None:
        """The teacher has run on so many rows of a shard, or of a row group `shard/start`, which is not written yet."""
        with self._lock:
            if name.partition("/")[0] not in self._finished:
                self._passed[name] = rows
                self._reached()

    def wrote(self, name: str, rows: int) -> None:
        """A shard is complete."""
        with self._lock:
            self._finished.add(name)
            for part in [part for part in self._passed if part.partition("/")[0] == name]:
                del self._passed[part]
            self._written += rows
            self._reached()

    def _reached(self) -> None:
        done = self._written + sum(self._passed.values())
        self._ran(done)
        if self._pace is None:  # the time before the first rows, in which a teacher starts, says nothing about the rest
            self._pace = Pace("running the teacher over the anchors", self._rows, self._report, done)
        else:
            self._pace.reached(done)

    def end(self) -> None:
        if self._pace is not None:
            self._pace.end()


@dataclass
class Telling:
    """Tells the driver of a build, from a teacher's process, how far its shard is."""

    build: str
    _next: float = field(default=0.0, repr=False)

    def __call__(self, name: str, rows: float) -> None:
        if time.monotonic() > self._next:
            self._next = time.monotonic() + POLL_S
            internal_kv._internal_kv_put(f"{self.build}/{name}", repr(rows), namespace=NAMESPACE)


@contextmanager
def heard(build: str, progress: BuildProgress) -> Iterator[None]:
    """Pass to `progress` what the teachers of a build report, while the body runs."""

    def listen(done: threading.Event) -> None:
        with suppress(Exception):  # a cluster that is lost is reported by what computes on it
            while not done.wait(POLL_S):
                for key in internal_kv._internal_kv_list(f"{build}/", namespace=NAMESPACE):
                    rows = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
                    if rows is not None:
                        progress.passed(key.decode().removeprefix(f"{build}/"), float(rows))

    try:
        with in_background(listen):
            yield
    finally:
        with suppress(Exception):
            internal_kv._internal_kv_del(f"{build}/", del_by_prefix=True, namespace=NAMESPACE)
