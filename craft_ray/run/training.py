"""One run: load, check, train, evaluate, certify. The same loop in this process, on one worker, or on many.

A run that is started again in the same folder goes on from its last checkpoint: that is all a lost worker or a
killed driver needs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim import AdamW, Optimizer

from craft_ray.anchors.schema import NOISE_FLOOR
from craft_ray.config import (
    DataConfig,
    EvalSet,
    EvaluationConfig,
    Experiment,
    RolloutEvalSet,
    TrainConfig,
    ValidationConfig,
)
from craft_ray.data.prefetch import prefetch
from craft_ray.data.sampler import StepSampler
from craft_ray.data.source import open_source
from craft_ray.errors import CacheRefused, ConfigError, DataError
from craft_ray.method.dual import DualState, epsilon_at
from craft_ray.method.gradients import GradientPair
from craft_ray.method.step import StepMetrics, craft_step, task_step
from craft_ray.models import load_model
from craft_ray.models.base import Batch, Model
from craft_ray.models.features import FeatureCache, Shelf, Shelves
from craft_ray.models.fingerprint import json_fingerprint
from craft_ray.retention.batches import AnchorBatch, AnchorBatches
from craft_ray.retention.student import check_untouched, heldout_loss, open_for_student
from craft_ray.run.checkpoint import TrainingState, last_checkpoint, load_training_state, save_checkpoint
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import HostSide, MetricsBuffer, Record, described
from craft_ray.run.scoring import EvalData, Score, evaluate, open_eval_set, ratio
from craft_ray.storage.files import write_atomically
from craft_ray.storage.lock import exclusive_lock
from craft_ray.workers import Workers

TASK_STREAM, ANCHOR_STREAM = 0, 1
SKILLS = ("old", "new")
HELD_OUT = ("validation", "evaluation")
STEP0_ANCHORS = 64
LOCK_WAIT_S = 120
"""A server of NFS keeps the lock of a machine that vanished for 90 s."""


class Observer(Protocol):
    """Who is told how a run goes: the console, or a file that the console follows."""

    def note(self, text: str) -> None: ...

    def steps(self, records: Sequence[Record]) -> None: ...

    def validated(self, record: Record) -> None: ...

    def done(self, result: dict[str, Any]) -> None: ...


class NullObserver:
    """Nobody is told."""

    def note(self, text: str) -> None: ...

    def steps(self, records: Sequence[Record]) -> None: ...

    def validated(self, record: Record) -> None: ...

    def done(self, result: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepData:
    """What one worker takes into a step, on its device."""

    task: list[Batch]
    anchors: list[AnchorBatch] | None


def train(config: Experiment, folder: RunFolder, workers: Workers, observer: Observer) -> None:
    """Carry a run to its end, from its last checkpoint if it has one, and write `result.json`.

    Raises:
        CraftError: the cache, the data, the model or the disk does not allow it; one line says what to do.
    """
    for _ in training(config, folder, workers, observer):
        pass


def training(
    config: Experiment, folder: RunFolder, workers: Workers, observer: Observer, shelves: Shelves | None = None
) -> Generator[Record]:
    """The same, stopping at each look at the validation data with what was seen. Closed there, the run ends early. Of a
    run that is finished the looks are read.

    Args:
        shelves: preprocessed samples of runs before it in this process.
    """
    with only_process(folder, workers):
        folder.pull()
        if workers.gather(folder.finished() is not None)[0]:
            yield from folder.read_validation()
            return
        with closing(Run(config, folder, workers, observer, shelves)) as run:
            run.evaluate_before()
            yield from run.looks()
            run.conclude()


@contextmanager
def only_process(folder: RunFolder, workers: Workers) -> Iterator[None]:
    """One process writes a run folder. A worker whose driver was killed ends a little later; wait for it.

    Raises:
        ConfigError: somebody else goes on training this run.
    """
    if workers.rank != 0:
        workers.gather(None)  # nobody looks for the last checkpoint before the folder is ours
        yield
        return
    refusal = ConfigError(f"another process is training the run {folder.home}: wait until it is done, or end it")
    with exclusive_lock(folder.home / ".lock", refusal, wait_s=LOCK_WAIT_S):
        workers.gather(None)
        yield


class Run:
    """A run in progress: the model, its data, its optimiser, and where it stands."""

    def __init__(
        self,
        config: Experiment,
        folder: RunFolder,
        workers: Workers,
        observer: Observer,
        shelves: Shelves | None = None,
    ) -> None:
        self.config = config
        self._shelves = shelves or Shelves()
        self.folder = folder
        self.workers = workers
        self.observer = observer
        self.main = workers.rank == 0
        checkpoint = last_checkpoint(folder.disk / "checkpoints")
        assert checkpoint is None or isinstance(checkpoint, Path)
        weights = None if checkpoint is None else str(checkpoint / "model")

        torch.manual_seed(config.seed)
        self.model: Model = load_model(config.model, config.train.precision, workers.device, weights)
        self.teacher_weights = None if checkpoint else self.model.weights_fingerprint()
        if self.main and self.teacher_weights:
            write_atomically(folder.disk / "teacher.json", json.dumps({"weights": self.teacher_weights}))
            for score in folder.disk.glob("teacher_*.json"):
                score.unlink()
        self.task = open_source(config.task, "task")
        self.model.check_source(self.task)
        if not self.task.has_responses:
            raise ConfigError("task.columns.response names no column: fine-tuning needs responses")
        self._task_features = FeatureCache(self._preprocess_task, self._shelf(config.task))

        self.anchors: AnchorBatches | None = None
        self.train_rows: list[int] = []
        self.heldout_rows: list[int] = []
        if config.craft.anchor_cache_dir is not None:
            self.anchors = open_for_student(config, self.model, self.teacher_weights, self._shelves)
            self.train_rows, self.heldout_rows = self.anchors.anchors.split(config.craft.anchor_holdout)
        elif config.craft.enabled:
            raise ConfigError(
                "craft is enabled, but craft.anchor_cache_dir names no cache: build one with 'craft-ray anchors "
                "build', or set craft.enabled=false for plain fine-tuning"
            )

        self.gradients = GradientPair(self.model.module.named_parameters(), with_retention=config.craft.enabled)
        self.optimizer = make_optimizer(self.gradients.parameters, config.train)
        self.dual = DualState.start(config.craft, workers.device) if config.craft.enabled else None
        self.before: dict[tuple[str, str], Score] = {}
        self._held_out: dict[tuple[str, str], EvalData] = {}
        self._heldout: tuple[int, float] | None = None
        self.step = 0
        if checkpoint is not None:
            self._restore(checkpoint)
        elif config.craft.enabled and self.anchors is not None:
            check_untouched(self.anchors, self.train_rows[:STEP0_ANCHORS], config.craft.anchor_batch_size, workers)
        if self.main:
            folder.keep_metrics_until(self.step)  # what a lost process logged after its last checkpoint comes again
        self._announce(checkpoint)

    def close(self) -> None:
        self.gradients.close()

    # -- where the run stands

    def _restore(self, checkpoint: Path) -> None:
        state = load_training_state(checkpoint, self.workers.device)
        ours = self.anchors.anchors.fingerprint if self.anchors and self.config.craft.enabled else None
        if state.cache != ours:
            raise CacheRefused(
                f"the run was trained with the anchor cache {state.cache}, craft.anchor_cache_dir holds {ours}: resume "
                f"with the cache it began with"
            )
        self.optimizer.load_state_dict(state.optimizer)
        self.dual = state.dual
        self.gradients.restore_reached(state.reached)
        self.step = state.step

    def _checkpoint(self) -> None:
        if not self.config.train.keep_checkpoints:
            return
        if self.main:
            state = TrainingState(
                self.step,
                self.optimizer.state_dict(),
                self.dual,
                self.gradients.reached,
                self.anchors.anchors.fingerprint if self.anchors and self.config.craft.enabled else None,
            )
            save_checkpoint(self.folder.disk / "checkpoints", self.model, state, self.config.train.keep_checkpoints)
            self.folder.push_checkpoint()
        self.workers.gather(None)  # nobody goes on before it is complete

    def _announce(self, checkpoint: Path | None) -> None:
        if not self.main:
            return
        count = sum(p.numel() for p in self.gradients.parameters)
        self.observer.note(
            f"{count / 1e6:.2f} M trainable parameters, {len(self.task)} samples of the new skill, "
            f"{self.workers.world_size} worker(s) on {self.workers.device}"
        )
        if self.config.craft.enabled and self.anchors is not None:
            self.observer.note(f"{len(self.train_rows)} anchors loaded, {len(self.heldout_rows)} more held out")
            self.observer.note(described(self.config.craft, self.anchors.layers, self.anchors.positions))
        else:
            self.observer.note("CRaFT is off: plain fine-tuning (the baseline arm)")
        if checkpoint is not None:
            self.observer.note(f"going on after step {self.step}")

    # -- data

    def _preprocess_task(self, row: int) -> Any:
        sample = self.task[row]
        return self.model.preprocess(sample, self.model.response_tokens(sample))

    def _shelf(self, data: DataConfig) -> Shelf:
        # Rows are the same however many are read.
        return self._shelves.of(data.model_dump_json(exclude={"limit"}), self.model.preprocessor_fingerprint())

    def batches(self) -> Iterator[StepData]:
        """This worker's part of each step that is still to do, made and copied to the device by another thread."""
        device = self.workers.device
        train_config, craft = self.config.train, self.config.craft
        tasks = StepSampler(len(self.task), train_config.batch_size, self.config.seed, TASK_STREAM)
        anchors = None
        if craft.enabled:
            anchors = StepSampler(len(self.train_rows), craft.anchor_batch_size, self.config.seed, ANCHOR_STREAM)

        def make(step: int) -> StepData:
            rank, size = self.workers.rank, self.workers.world_size
            rows = tasks.local_batch(step, rank, size)
            task = [self.model.collate([self._task_features[r] for r in part]).to(device) for part in self._split(rows)]
            if anchors is None or step % craft.retention_freq:
                return StepData(task, None)
            assert self.anchors is not None
            chosen = anchors.local_batch(step // craft.retention_freq, rank, size)
            parts = [self.anchors.batch([self.train_rows[i] for i in part]) for part in self._split(chosen)]
            return StepData(task, [part.to(device) for part in parts])

        return prefetch(make, self.step, train_config.steps, train_config.prefetch)

    def _split(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """Micro-batches of equal size."""
        size = len(rows) // self.config.train.accumulate
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    # -- the loop

    def looks(self) -> Iterator[Record]:
        """Train to the end, and look at the validation data every `validation.every` steps and at the end."""
        validation, steps = self.config.validation, self.config.train.steps
        wanted = bool(validation.every or validation.old or validation.new)
        every = validation.every or steps
        seen = self.workers.gather([record["step"] for record in self.folder.read_validation()])[0]
        if wanted and self.step and self.step not in seen and (self.step % every == 0 or self.step == steps):
            yield self.look()  # the process was lost between its checkpoint and the look
        while self.step < steps:
            self.loop(until=self.step + every - self.step % every)
            if wanted:
                yield self.look()

    def look(self) -> Record:
        """The student on validation data and held-out anchors. Weights and random numbers stay as they are.

        Returns:
            `step`; `old/score`, `old/ratio` (to the teacher's), the same of `new`; `heldout/retention_loss` and
            `heldout/violation`, max(0, L_ret / epsilon - 1) at the final epsilon. Ratios of a teacher's zero are None.
        """
        record: Record = {"step": self.step}
        for skill, eval_set in eval_sets(self.config, "validation"):
            before, after = self.before["validation", skill], self._student_score("validation", skill, eval_set)
            record[f"{skill}/score"] = after.value
            record[f"{skill}/ratio"] = ratio(before.metric, after.value, before.value)
        if self.anchors is not None:
            loss = self._heldout_loss()
            record["heldout/retention_loss"] = loss
            record["heldout/violation"] = max(0.0, loss / self.config.craft.epsilon_final - 1)
        if self.main:
            self.folder.append_validation(record)
            self.observer.validated(record)
            self.folder.push()
        return record

    def loop(self, until: int | None = None) -> None:
        """Steps, their log, and checkpoints; the last step saves one. `until` stops earlier."""
        config = self.config.train
        stop = min(until or config.steps, config.steps)
        buffer = MetricsBuffer(self.config.arm)
        with closing(self.batches()) as batches:  # type: ignore[type-var]
            while self.step < stop:
                started = time.perf_counter()
                data = next(batches)
                waited = time.perf_counter() - started
                seed_step(self.config.seed, self.step, self.workers.rank)
                lr = learning_rate(self.step, config)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                epsilon = epsilon_at(self.step, config.steps, self.config.craft)
                metrics = self._update(data, epsilon)
                self.step += 1
                last = self.step == config.steps
                save = last or (config.checkpoint_every and self.step % config.checkpoint_every == 0)
                log = save or self.step == stop or self.step % config.log_every == 0
                if log and self.workers.device.type == "cuda":
                    torch.cuda.synchronize()  # the log waits anyway; so the times add up to what the steps took
                spent = time.perf_counter() - started
                buffer.add(metrics, HostSide(self.step, lr, epsilon, spent, waited, data.anchors is not None))
                if log:
                    self._log(buffer.flush())
                if save:
                    self._checkpoint()

    def _update(self, data: StepData, epsilon: float) -> StepMetrics:
        craft = self.config.craft
        common: dict[str, Any] = {
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "workers": self.workers,
            "max_norm": self.config.train.max_grad_norm,
        }
        if self.dual is None:
            loss, norm = task_step(self.model.task_loss, data.task, **common)
            nan = loss.new_full((), torch.nan)
            return StepMetrics(loss, norm, nan, nan, nan, nan, nan)
        assert self.anchors is not None
        floor = NOISE_FLOOR[self.anchors.anchors.identity.dtype] if craft.retention_mode == "hidden" else 0.0
        self.dual, metrics = craft_step(
            self.model.task_loss,
            data.task,
            lambda batch: self.anchors.loss(batch, craft.loss_type),  # type: ignore[union-attr]
            data.anchors,
            self.dual,
            epsilon,
            craft=craft,
            noise_floor=floor,
            **common,
        )
        return metrics

    def _log(self, records: list[Record]) -> None:
        if self.main:
            self.folder.append_metrics(records)
            self.observer.steps(records)

    # -- what came out

    def evaluate_before(self) -> None:
        """The teacher's scores, measured once for all runs beside each other that share teacher and data."""
        for section in HELD_OUT:
            for skill, eval_set in eval_sets(self.config, section):
                self.before[section, skill] = self._teacher_score(section, skill, eval_set)

    def _teacher_score(self, section: str, skill: str, eval_set: EvalSet) -> Score:
        data = self.eval_data(section, skill, eval_set)
        teacher = self.teacher_weights or self._teacher_of_resumed_run()
        how = [self.model.preprocessor_fingerprint(), self.config.train.precision]
        key = json_fingerprint([teacher, data.of.fingerprint, eval_set.decisive, how])
        own = self._own_teacher_score(section, skill)
        shared = self.folder.shared / f".teacher-score-{key[:16]}.json"
        known = self.workers.gather({str(p): json.loads(p.read_text()) for p in (own, shared) if p.exists()})[0]
        if known:
            found = next(iter(known.values()))
            if found["key"] != key:
                raise ConfigError(
                    f"{section}.{skill} is not what it was when the run began: its data or settings changed, and the "
                    f"teacher can no longer be scored on them; restore them, or start the run anew"
                )
            score = Score(**found["score"])
        elif self.step:
            raise ConfigError(f"{own} is gone, and a resumed run no longer has the teacher to score: start it anew")
        else:
            score = evaluate(data, self.workers)
        if self.main:
            for path in (own, shared):
                if str(path) not in known:
                    write_atomically(path, json.dumps({"key": key, "score": asdict(score)}))
            if section == "evaluation":
                self.folder.write_predictions(f"{skill}_before", score.records)
        return score

    def _student_score(self, section: str, skill: str, eval_set: EvalSet) -> Score:
        return evaluate(self.eval_data(section, skill, eval_set), self.workers)

    def eval_data(self, section: str, skill: str, eval_set: EvalSet) -> EvalData:
        """Held-out data, opened once.

        Raises:
            ConfigError: nothing is there, or the model cannot read it or act in it.
        """
        if (section, skill) not in self._held_out:
            source = open_eval_set(eval_set, f"{section}.{skill}")
            shelf = None if isinstance(eval_set, RolloutEvalSet) else self._shelf(eval_set.data)
            self._held_out[section, skill] = EvalData(self.model, source, eval_set, shelf)
        return self._held_out[section, skill]

    def _own_teacher_score(self, section: str, skill: str) -> Path:
        """The score that this run began with; a run can be moved and still be resumed."""
        return self.folder.disk / f"teacher_{'' if section == 'evaluation' else section + '_'}{skill}.json"

    def _teacher_of_resumed_run(self) -> str:
        """The teacher's hash, for a run whose model is no longer the teacher."""
        path = self.folder.disk / "teacher.json"
        return str(json.loads(path.read_text())["weights"])

    def conclude(self) -> None:
        """Score the student, certify the budget on held-out anchors, and write the result."""
        config = self.config
        result: dict[str, Any] = {"name": config.name, "arm": config.arm, "seed": config.seed, "steps": self.step}
        result |= {skill: {"before": None, "after": None} for skill in SKILLS}
        for skill, eval_set in eval_sets(config, "evaluation"):
            score, after = self.before["evaluation", skill], self._student_score("evaluation", skill, eval_set)
            result[skill] = {
                "metric": score.metric,
                "before": score.value,
                "after": after.value,
                "ratio": ratio(score.metric, after.value, score.value),
                "samples": score.samples,
            }
            for when, seen in (("before", score), ("after", after)):
                result[skill] |= {f"{name}_{when}": value for name, value in seen.details.items()}
            if self.main:
                self.folder.write_predictions(f"{skill}_after", after.records)
        result |= self._certificate()
        result["seconds"] = self._seconds()
        if self.main:
            self.folder.write_result(result)
            self.observer.done(result)

    def _certificate(self) -> dict[str, Any]:
        """L_ret on anchors that training has not seen, against the final budget."""
        if self.anchors is None:
            return {"retention_loss": None, "epsilon": None, "feasible": None}
        craft = self.config.craft
        loss, epsilon = self._heldout_loss(), craft.epsilon_final
        return {
            "retention_mode": craft.retention_mode,
            "retention_loss": loss,
            "epsilon": epsilon,
            "violation": max(0.0, loss / epsilon - 1),
            "feasible": loss <= epsilon,
            "heldout_anchors": len(self.heldout_rows),
            "lambda": None if self.dual is None else float(self.dual.multiplier),
            "lambda_max": craft.lambda_max,
            "cache": self.anchors.anchors.fingerprint,
        }

    def _heldout_loss(self) -> float:
        """L_ret on the held-out anchors, or on all where none is held out."""
        assert self.anchors is not None
        if self._heldout is None or self._heldout[0] != self.step:
            craft, rows = self.config.craft, self.heldout_rows or self.train_rows
            loss = heldout_loss(self.anchors, rows, craft.anchor_batch_size, craft.loss_type, self.workers)
            if not math.isfinite(loss):
                raise DataError(f"the retention loss on held-out anchors is {loss}: the last checkpoint is not usable")
            self._heldout = (self.step, loss)
        return self._heldout[1]

    def _seconds(self) -> float:
        return math.fsum(record["perf/step_s"] for record in self.folder.read_metrics()) if self.main else 0.0


def eval_sets(config: Experiment, section: str) -> list[tuple[str, EvalSet]]:
    """The skills that `validation` or `evaluation` names data for."""
    sets: ValidationConfig | EvaluationConfig = config.validation if section == "validation" else config.evaluation
    return [(skill, eval_set) for skill, eval_set in (("old", sets.old), ("new", sets.new)) if eval_set is not None]


def make_optimizer(parameters: Sequence[torch.Tensor], config: TrainConfig) -> Optimizer:
    """AdamW over all parameters; the fused kernel, which is the fastest and waits for nothing."""
    return AdamW(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step (from 0): linear warm-up, then constant, linear or cosine decay to zero at the end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * factor[config.schedule]


def seed_step(seed: int, step: int, rank: int) -> None:
    """What is random in a step depends on these three alone, so nothing random has to be saved."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + rank) % (1 << 63))
