"""The checkpoints that a run writes: after which steps, and that the first one is what was trained."""

from __future__ import annotations

import time
from pathlib import Path

from craft_ray.config import Experiment
from craft_ray.models.base import Model
from craft_ray.run.best import BestValidation
from craft_ray.run.cadence import CheckpointClock
from craft_ray.run.checkpoint import TrainingState, check_saved, checkpoint_name, save_checkpoint
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import Observer
from craft_ray.storage.last import point_last
from craft_ray.workers import Workers


class CheckpointWriter:
    """Writes the checkpoints of a run, as one process for all of its workers."""

    def __init__(
        self, config: Experiment, folder: RunFolder, workers: Workers, observer: Observer, best: BestValidation
    ) -> None:
        self._config = config
        self._folder = folder
        self._workers = workers
        self._observer = observer
        self._best = best
        self._keep = config.train.keep_checkpoints
        self._clock = CheckpointClock(config.train.checkpoint_minutes if self._keep else 0, workers)
        self._read_back = False  # whether this process has loaded a checkpoint of its own again

    def due(self, step: int) -> bool:
        """Whether one is written after this step: by time, by number, because it is the last, or because a validation
        follows that may be the best. Ask after each."""
        every, steps = self._config.train.checkpoint_every, self._config.train.steps
        return self._clock.due() or bool(every and step % every == 0) or step == steps or self._best.judges(step)

    def write(self, model: Model, state: TrainingState) -> None:
        """Write a checkpoint, if the run keeps any. No worker continues before it is complete."""
        if not self._keep:
            return
        started = time.monotonic()
        if self._workers.rank == 0:
            check = None if self._read_back else lambda folder: self._check(model, folder)
            save_checkpoint(self._folder.disk / "checkpoints", model, state, self._keep, check, self._best.step)
            self._read_back = True
            self._folder.push_checkpoint()
        self._workers.gather(None)
        self._clock.saved(time.monotonic() - started)

    def point_back(self, step: int) -> None:
        """Make an earlier checkpoint the run's model, `checkpoints/last`."""
        if self._workers.rank == 0:
            point_last(self._folder.disk / "checkpoints", checkpoint_name(step))
            self._folder.push_checkpoint()
        self._workers.gather(None)

    def _check(self, model: Model, folder: Path) -> None:
        check_saved(self._config.model, self._config.train.precision, model, folder)
        self._observer.note("the first checkpoint was loaded again: its weights are those that were trained")
