"""Checkpoints by time: when they are due, and that they change nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

from craft_ray.run.cadence import CheckpointClock
from craft_ray.workers import OneWorker


class Asked(OneWorker):
    """Counts the messages among the workers."""

    messages = 0

    def gather(self, value: Any) -> list[Any]:
        Asked.messages += 1
        return [value]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"s": 1000.0}
    monkeypatch.setattr(time, "monotonic", lambda: now["s"])
    return now


def due_at(clock: dict[str, float], seconds: float, minutes: float, steps: int, save_s: float = 0.0) -> list[int]:
    """The steps, of `seconds` each, after which a checkpoint is due."""
    Asked.messages = 0
    checkpoints, found = CheckpointClock(minutes, Asked()), []
    for step in range(1, steps + 1):
        clock["s"] += seconds
        if checkpoints.due():
            clock["s"] += save_s
            checkpoints.saved(save_s)
            found.append(step)
    return found


def test_no_more_than_the_time_is_lost(clock: dict[str, float]) -> None:
    assert due_at(clock, 1.0, 1.0, 200) == [60, 120, 180]
    assert Asked.messages < 30, "the workers seldom talk about it"
    assert due_at(clock, 90.0, 1.0, 4) == [1, 2, 3, 4]
    assert due_at(clock, 1 / 128, 1.0, 7_700) == [7_680]


def test_no_time_means_none_by_time(clock: dict[str, float]) -> None:
    assert due_at(clock, 3600.0, 0.0, 50) == []
    assert Asked.messages == 0


def test_slow_checkpoints_are_further_apart(clock: dict[str, float]) -> None:
    """A checkpoint of 30 s may be written every 600 s: it takes 5 % of the time."""
    assert due_at(clock, 1.0, 1.0, 1300, save_s=30.0) == [60, 660, 1260]


def test_other_workers_follow_the_first_ones_clock(clock: dict[str, float]) -> None:
    class Second(OneWorker):
        def gather(self, value: Any) -> list[Any]:
            return [(True, 7), value]

    checkpoints = CheckpointClock(60.0, Second())
    clock["s"] += 1.0
    assert checkpoints.due(), "its own hour is not over"
