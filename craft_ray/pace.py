"""How far long work has progressed, and about how long the rest of it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

SAY_S = 2.0
"""Time between two reports."""
Report = Callable[[str, float, int, float], None]
"""Receives what `Observer.progress` does."""


def unreported(what: str, done: float, total: int, left_s: float) -> None:
    """A `Report` that nobody reads."""


class Pace:
    """Reports work that takes long every few seconds, with an estimate of the time that is left.

    Args:
        before: parts that were done before, which say nothing about the pace.
    """

    def __init__(self, what: str, total: int, report: Report, before: float = 0) -> None:
        self._what, self._total, self._report = what, total, report
        self._before = self._reached = before
        self._started = self._said = time.monotonic()

    def reached(self, done: float) -> None:
        """So many parts are done; `end` reports the last."""
        self._reached = done
        now = time.monotonic()
        if now - self._said > SAY_S and self._before < done < self._total:
            self._said = now
            left_s = (now - self._started) / (done - self._before) * (self._total - done)
            self._report(self._what, min(done, self._total), self._total, max(left_s, 1.0))

    def end(self) -> None:
        """The work is over; it may have ended early."""
        if self._said != self._started:
            self._report(self._what, min(self._reached, self._total), self._total, 0.0)
