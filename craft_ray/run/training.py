"""One run: load, check, train, evaluate, certify. The loop is the same in this process, on one worker, or on many.

A run that is started again in the same folder resumes from its last checkpoint: this is all the recovery that a lost
worker or a killed driver needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from craft_ray import interruption
from craft_ray.config import Experiment
from craft_ray.data.prefetch import prefetch
from craft_ray.models import load_model, teacher_of
from craft_ray.models.adapting import attach
from craft_ray.models.base import Batch, Model
from craft_ray.models.features import FeatureCache
from craft_ray.models.sharding import open_mesh
from craft_ray.retention.constraints import open_constraints
from craft_ray.retention.mode import Terms
from craft_ray.run.best import BestValidation
from craft_ray.run.checkpoint import TrainingState
from craft_ray.run.folder import RunFolder
from craft_ray.run.held_out import HeldOut, eval_sets
from craft_ray.run.identity import check_same, model_identity, record
from craft_ray.run.judgement import judged
from craft_ray.run.locks import only_process
from craft_ray.run.metrics import HostSide, MetricsBuffer, Record
from craft_ray.run.observers import Observer
from craft_ray.run.optimization import make_optimization, seed_step
from craft_ray.run.rows import check_rows
from craft_ray.run.saving import CheckpointWriter
from craft_ray.run.sharded_checkpoint import is_sharded, restore
from craft_ray.run.task_data import TaskData
from craft_ray.storage.last import last_checkpoint
from craft_ray.workers import Workers

STATIONARITY_BATCHES = 8
"""Batches, at most, on which the two gradients are compared at the end: a twentieth of the run's steps."""


def train(config: Experiment, folder: RunFolder, workers: Workers, observer: Observer) -> None:
    """Train a run to its end, from its last checkpoint if it has one, and write `result.json`.

    Raises:
        CraftError: the cache, the data, the model or the disk does not allow it; one line says what to do.
    """
    for _ in training(config, folder, workers, observer):
        pass


def training(
    config: Experiment, folder: RunFolder, workers: Workers, observer: Observer, features: FeatureCache | None = None
) -> Generator[Record]:
    """Like `train`, but yields the record of each validation. A generator that is closed there ends the run early. The
    validations of a finished run are read from its folder.

    Args:
        features: preprocessed samples of earlier runs in this process.
    """
    with only_process(folder, workers):
        folder.pull()
        if workers.gather(folder.finished() is not None)[0]:
            yield from folder.read_validation()
            return
        with closing(Run(config, folder, workers, observer, features)) as run:
            check_every_row(run)
            run.held_out.score_teacher()
            yield from run.validations()
            run.conclude()


@dataclass(frozen=True)
class StepData:
    """The data of one worker for one step, on its device."""

    task: list[Batch]
    anchors: list[Terms] | None


class Run:
    """A run in progress: the model, its data, its optimiser, its constraints, and its current step."""

    def __init__(
        self,
        config: Experiment,
        folder: RunFolder,
        workers: Workers,
        observer: Observer,
        features: FeatureCache | None = None,
    ) -> None:
        self.config, self.folder, self.workers, self.observer = config, folder, workers, observer
        self.main = workers.rank == 0
        self.features = features = (features or FeatureCache()).with_loaders(config.train.loader_workers)
        self.best = BestValidation(config)
        checkpoint = last_checkpoint(folder.disk / "checkpoints")
        assert checkpoint is None or isinstance(checkpoint, Path)
        weights = None if checkpoint is None or is_sharded(checkpoint) else str(checkpoint / "model")

        torch.manual_seed(config.seed)
        mesh = open_mesh(config.workers, workers)
        self.model: Model = load_model(config.model, config.train.precision, workers.device, weights, mesh)
        teacher_weights = None if checkpoint else self.model.weights_fingerprint()
        if config.adapter is not None and teacher_weights is not None:
            torch.manual_seed(config.seed)  # the adapter's first values do not depend on how the model was loaded
            attach(self.model, config.adapter, config.model, teacher_weights)
        teacher = teacher_of(config, self.model, checkpoint is None)
        self.task = TaskData(config, self.model, workers, features, teacher, observer.progress)
        if self.main:
            untouched = model_identity(config, self.model, teacher_weights)
            check_same(folder, config, self.task.source.fingerprint, untouched)
        self.held_out = HeldOut(config, self.model, teacher_weights, folder, workers, features, observer.progress)
        self.constraints = open_constraints(config, self.model, teacher_weights, workers, features, observer.progress)
        self.gradients = self.constraints.gradient_pair(self.model)
        self.optimization = make_optimization(self.model, self.gradients.parameters, config.train)
        self.optimizer = self.optimization.optimizer
        self.checkpoints = CheckpointWriter(config, folder, workers, observer, self.best)
        self.step = 0
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self.constraints.check_untouched()
        if self.main:
            record(folder, config, self.task.source.fingerprint, untouched)
            folder.keep_metrics_until(self.step)  # steps that a lost process logged after its last checkpoint are rerun
            self._announce()

    def close(self) -> None:
        for part in (self.checkpoints, self.gradients, self.features):
            part.close()

    def _announce(self) -> None:
        count = sum(p.numel() for p in self.gradients.parameters)
        self.observer.note(
            f"{count / 1e6:.2f} M trainable parameters, {self.task.size} of the new skill, "
            f"{self.workers.world_size} worker(s) on {self.workers.device}"
        )
        for line in filter(None, [self.optimization.described, *self.task.described(), *self.constraints.described()]):
            self.observer.note(line)
        if self.step:
            self.observer.note(f"resuming after step {self.step}")

    # -- the state of the run

    def _restore(self, checkpoint: Path) -> None:
        state = restore(checkpoint, self.model, self.gradients, self.optimizer, self.workers)
        self.constraints.load_state_dicts(state.constraints)
        self.optimization.check_preset(state.optimizer)
        self.gradients.restore_reached(state.reached)
        self.step = state.step

    def _checkpoint(self) -> None:
        constraints = self.constraints.state_dicts()
        state = TrainingState(self.step, self.optimization.state_dict(), self.gradients.reached, constraints)
        self.checkpoints.write(self.model, state, self.gradients, self.optimizer)

    def _return_to(self, step: int) -> None:
        """Return to an earlier step: its weights, and the budget and λ that belong to them."""
        state = self.checkpoints.back_to(step, self.model)
        self.constraints.load_state_dicts(state.constraints)
        self.held_out.forget_student()
        self.step = state.step

    # -- data

    def batches(self, stop: int) -> Iterator[StepData]:
        """This worker's part of each step until `stop`, prepared and copied to the device by another thread."""
        return prefetch(self._step_data, self.step, stop, self.config.train.prefetch)

    def _step_data(self, step: int) -> StepData:
        task = [part.to(self.workers.device) for part in self.task.batches(step)]
        anchors = self.constraints.batches(step)
        return StepData(task, None if anchors is None else [part.to(self.workers.device) for part in anchors])

    # -- the loop

    def validations(self) -> Iterator[Record]:
        """Train to the end, and validate every `validation.every` steps and at the end."""
        validation, steps = self.config.validation, self.config.train.steps
        wanted = bool(validation.every or eval_sets(self.config, "validation"))
        every = validation.every or steps
        past = {record["step"]: record for record in self.workers.gather(self.folder.read_validation())[0]}
        self.best.observe(past.values())
        self.checkpoints.hold_best()
        if wanted and self.step and (self.step % every == 0 or self.step == steps):
            if self.step not in past:
                yield self.validate()  # the process was lost between the checkpoint and its validation
            elif self.step < steps:
                self.constraints.observe(past[self.step])  # a checkpoint is written before its validation
        while self.step < steps and not self.best.exhausted:
            self.loop(until=self.step + every - self.step % every)
            if wanted:
                yield self.validate()

    def validate(self) -> Record:
        """Score the student on validation data and held-out anchors. Weights and random numbers stay unchanged.

        Returns:
            `step`, the scores of `HeldOut.validation`, and the losses of `Constraints.validation`.
        """
        record: Record = {"step": self.step} | self.held_out.validation() | self.constraints.validation(self.step)
        if self.step < self.config.train.steps:  # what is certified is the budget of the last step
            self.constraints.observe(record)
        self.best.observe([record])
        if self.main:
            self.folder.append_validation(record)
            self.observer.validated(record)
            self.folder.push()
        return record

    def loop(self, until: int | None = None) -> None:
        """Run steps, log them, and save checkpoints; the last step always saves one. `until` stops earlier."""
        config = self.config.train
        stop = min(until or config.steps, config.steps)
        buffer = MetricsBuffer([constraint.skill for constraint in self.constraints.held])
        with closing(self.batches(stop)) as batches:  # type: ignore[type-var]
            while self.step < stop:
                interruption.check()
                started = time.perf_counter()
                data = next(batches)
                waited = time.perf_counter() - started
                seed_step(self.config.seed, self.step, self.workers.rank)
                lr = self.optimization.set_rate(self.step)
                epsilons = self.constraints.epsilons(self.step)
                metrics = self.constraints.update(
                    self.model.task_loss,
                    data.task,
                    data.anchors,
                    self.step,
                    optimizer=self.optimizer,
                    gradients=self.gradients,
                    max_norm=self.optimization.max_norm,
                )
                self.step += 1
                save = self.checkpoints.due(self.step)
                log = save or self.step == stop or self.step % config.log_every == 0
                if log and self.workers.device.type == "cuda":
                    torch.cuda.synchronize()  # the log waits anyway; this way the times add up to what the steps took
                spent = time.perf_counter() - started
                buffer.add(metrics, HostSide(self.step, lr, epsilons, spent, waited, data.anchors is not None))
                if log:
                    self._log(buffer.flush())
                if save:
                    self._checkpoint()

    def _log(self, records: list[Record]) -> None:
        if self.main:
            self.folder.append_metrics(records)
            self.observer.steps(records)

    # -- the result

    def conclude(self) -> None:
        """Score the student, certify the budget on held-out anchors, and write the result."""
        config, trained = self.config, self.step
        kept = None if self.best.step == trained else self.best.step
        if kept is not None:
            self._return_to(kept)
        result: dict[str, Any] = {"name": config.name, "arm": config.arm, "seed": config.seed, "steps": self.step}
        result |= {"task_samples": self.task.count} | self.best.described(trained)
        result |= self.held_out.evaluation()
        result |= judged(self.constraints.certificates(self.step), self.held_out.certificates(), result)
        result["stationarity"] = self._stationarity()
        if kept is not None:  # only now: a process that is lost before resumes from the last step
            self.checkpoints.keep(kept)
        if self.main:
            result["seconds"] = math.fsum(record["perf/step_s"] for record in self.folder.read_metrics())
            self.folder.write_result(result)
            self.observer.done(result)

    def _stationarity(self) -> float | None:
        """The residual of the solution's condition on several batches; None in plain fine-tuning, and where the two
        gradients are not kept apart."""
        if not self.constraints.compares_gradients:
            return None
        count = min(max(self.config.train.steps // 20, 1), STATIONARITY_BATCHES)
        data = [self._step_data(index * self.config.craft.retention_freq) for index in range(count)]
        task, anchors = [b for d in data for b in d.task], [b for d in data for b in d.anchors or ()]
        return self.constraints.stationarity(self.model.task_loss, task, anchors, self.gradients)


def check_every_row(run: Run) -> None:
    """Check every row of the task and of the held-out sets before they are needed.

    Raises:
        DataError: a row cannot be used.
    """
    for rows in [run.task.rows(), *run.held_out.rows()]:
        check_rows(rows, run.config.train.check_minutes, run.workers, run.observer.note, run.observer.progress)
