"""What the trials of a sweep say while they run: they are processes of their own, each writes into its run's folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from craft_pipelines.console import STORE_POLL_S, Messages, Notes, Screen
from craft_ray.background import in_background
from craft_ray.run.metrics import Record
from craft_ray.storage.paths import ObjectPath
from craft_ray.sweep.trials import Plan, SweepFolder, TrialFolder, seeds

POLL_S = 0.5
Reached = Callable[[int, float], None]
"""Receives the number of a trial, and the part of its steps that is done."""


class TrialObserver:
    """The run of a trial on one seed: what it notes, and how far it is.

    Args:
        before: steps of the trial on the seeds before it.
        steps: those on all seeds.
    """

    def __init__(self, number: int, before: int, steps: int, screen: Screen, notes: Notes, reached: Reached) -> None:
        self._number, self._before, self._steps = number, before, steps
        self._screen, self._notes, self._reached = screen, notes, reached

    def note(self, text: str) -> None:
        self._notes.add(f"trial {self._number}", text)

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        self._screen.progress(f"[trial {self._number}] {what}", done, total, left_s)

    def steps(self, records: Sequence[Record]) -> None:
        self._reached(self._number, (self._before + records[-1]["step"]) / self._steps)

    def validated(self, record: Record) -> None:
        """A trial reports it to Tune."""

    def done(self, result: dict[str, Any]) -> None:
        """The trial has a line of its own."""


class RunningTrials:
    """Follows the trials that are running.

    Args:
        say: prints a note.
    """

    def __init__(self, folder: SweepFolder, plan: Plan, screen: Screen, say: Callable[[str], None]) -> None:
        self._plan, self._screen, self._notes = plan, screen, Notes(say)
        self._poll_s = STORE_POLL_S if isinstance(folder.path, ObjectPath) else POLL_S
        self._followed: dict[int, list[tuple[Messages, TrialObserver]]] = {}
        self._lock = threading.Lock()

    def add(self, trial: TrialFolder, reached: Reached) -> None:
        """Follow a trial that starts, or starts again."""
        params = trial.params() or {}
        runs, steps = seeds(self._plan.config, params), params.get("train.steps", self._plan.config.train.steps)
        followed = []
        for at, seed in enumerate(runs):
            own = TrialObserver(trial.number, at * steps, len(runs) * steps, self._screen, self._notes, reached)
            followed.append((Messages(trial.run(seed).progress), own))
        with self._lock:
            self._followed[trial.number] = followed

    def remove(self, trial: TrialFolder) -> None:
        """A trial has ended: what it said last is passed on."""
        with self._lock:
            for messages, observer in self._followed.pop(trial.number, []):
                messages.pass_to(observer)
                messages.end()

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow them while the body runs."""

        def follow(done: threading.Event) -> None:
            while not done.wait(self._poll_s):
                with self._lock:
                    for messages, observer in [one for each in self._followed.values() for one in each]:
                        messages.pass_to(observer)

        with in_background(follow):
            yield
