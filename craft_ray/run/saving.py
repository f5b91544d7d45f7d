"""The checkpoints that a run writes: after which steps, and that the first one is what was trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch.optim import Optimizer

from craft_ray.config import Experiment
from craft_ray.method.gradients import GradientPair
from craft_ray.models.base import Model
from craft_ray.run.best import BestValidation
from craft_ray.run.cadence import CheckpointClock
from craft_ray.run.checkpoint import (
    TrainingState,
    check_saved,
    checkpoint_name,
    load_training_state,
    load_weights,
    save_checkpoint,
)
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import Observer
from craft_ray.run.sharded_checkpoint import begin_sharded, check_exported
from craft_ray.storage.last import point_last
from craft_ray.workers import ProcessGroup, Workers


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
        self._read_back = False  # whether this process has read back a checkpoint of its own
        self._beside: ProcessGroup | None = None
        self._writing: Future[None] | None = None
        if config.train.checkpoint_async:
            assert isinstance(workers, ProcessGroup), "the config allows it in sharded runs alone"
            self._beside = workers.beside()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def due(self, step: int) -> bool:
        """Whether one is written after this step: by time, by number, because it is the last, or because a validation
        follows that may be the best. Ask after each."""
        every, steps = self._config.train.checkpoint_every, self._config.train.steps
        return self._clock.due() or bool(every and step % every == 0) or step == steps or self._best.judges(step)

    def write(self, model: Model, state: TrainingState, gradients: GradientPair, optimizer: Optimizer) -> None:
        """Write a checkpoint, if the run keeps any. No worker continues before it is complete; with
        `train.checkpoint_async` before it is copied, and the one before it complete."""
        if not self._keep:
            return
        started = time.monotonic()
        self.wait()
        if model.trains_shards:
            self._write_sharded(model, state, gradients, optimizer)
        elif self._workers.rank == 0:
            check = None if self._read_back else lambda folder: self._check(model, folder)
            save_checkpoint(self._folder.disk / "checkpoints", model, state, self._keep, check, self._best.step)
            self._read_back = True
            self._folder.push_checkpoint()
        self._workers.gather(None)
        self._clock.saved(time.monotonic() - started)

    def hold_best(self) -> None:
        """Fetch the best checkpoint of a resumed run: one that is not there counts as removed."""
        if self._best.step is not None:
            self._folder.checkpoint(checkpoint_name(self._best.step))

    def back_to(self, step: int, model: Model) -> TrainingState:
        """Give the model the weights of an earlier checkpoint. The run resumes from its last one until `keep`."""
        checkpoint = self._folder.checkpoint(checkpoint_name(step))
        load_weights(model, self._config.model, self._config.train.precision, checkpoint)
        return load_training_state(checkpoint)

    def keep(self, step: int) -> None:
        """Make an earlier checkpoint `checkpoints/last`, which is the run's model."""
        if self._workers.rank == 0:
            point_last(self._folder.disk / "checkpoints", checkpoint_name(step))
            self._folder.push_pointer(checkpoint_name(step))

    def _write_sharded(self, model: Model, state: TrainingState, gradients: GradientPair, optimizer: Optimizer) -> None:
        """Write a sharded checkpoint with all workers. At the last step it gets a `model` folder, whose weights are
        compared with those in memory."""
        last = state.step == self._config.train.steps
        folder, name = self._folder.disk / "checkpoints", checkpoint_name(state.step)
        beside = None if last else self._beside
        complete = begin_sharded(
            *(folder, model, state, gradients, optimizer, self._workers, self._keep),
            export=last,
            apart=self._folder.home != self._folder.path,
            beside=beside,
        )
        if beside is not None:
            self._writing = self._thread.submit(self._complete, complete, name, beside)
            return
        self._complete(complete, name, self._workers)
        if last:
            trained = model.weights_fingerprint()
            if self._workers.rank == 0:
                check_exported(self._config.model, self._config.train.precision, trained, folder / name / "model")

    def _complete(self, complete: Callable[[], Path], name: str, workers: Workers) -> None:
        complete()
        self._folder.push_parts(name, workers)

    def wait(self) -> None:
        """Wait until the checkpoint that another thread writes is complete.

        Raises:
            StorageError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the thread, which completes the checkpoint that it writes."""
        if self._beside is not None:
            self._thread.shutdown()

    def _check(self, model: Model, folder: Path) -> None:
        check_saved(self._config.model, self._config.train.precision, model, folder)
        self._observer.note("the first checkpoint was loaded again: its weights are those that were trained")
