"""When a checkpoint is due by time, the same on all workers."""

from __future__ import annotations

import time

from craft_ray.workers import Workers

SHARE = 0.05
"""Largest share of the time that is spent on checkpoints by time."""


class CheckpointClock:
    """Says after which step a checkpoint is due because the last one is `minutes` old.

    The first worker's clock decides for all of them. They ask it together, which costs a message, so they agree on the
    step at which they ask again: after half of the steps that still fit. A checkpoint decides no number, so it does not
    matter that the step differs from run to run.
    """

    def __init__(self, minutes: float, workers: Workers) -> None:
        self._seconds = 60 * minutes
        self._workers = workers
        self._least_s = 0.0
        self._since = time.monotonic()
        self._steps = 0
        self._ask_at = 1

    def due(self) -> bool:
        """Ask after each step."""
        if not self._seconds:
            return False
        self._steps += 1
        if self._steps < self._ask_at:
            return False
        spent = time.monotonic() - self._since
        left = max(self._seconds, self._least_s) - spent
        pause = max(1, int(left * self._steps / spent / 2)) if spent > 0 else 1
        due, pause = self._workers.gather((left <= 0, pause))[0]
        self._ask_at = self._steps + pause
        return bool(due)

    def saved(self, took_s: float) -> None:
        """A checkpoint was written, for whatever reason, in `took_s` seconds."""
        self._since, self._steps, self._ask_at = time.monotonic(), 0, 1
        self._least_s = took_s / SHARE
