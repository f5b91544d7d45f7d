"""CRaFT's step in LeRobot's own training loop.

    with craft_updates(load_config("run.yaml")):
        lerobot_train.train(...)

LeRobot's loop keeps its data, its optimiser, its schedule, its logs and its checkpoints. While the context is open, the
loop takes CRaFT's step instead of its own, and the normaliser keeps the teacher's statistics.

- Where accelerate accumulates gradients over N batches (`accelerate launch --gradient_accumulation_steps N`), the
  hook collects N batches of the loop, also across the end of an epoch, and takes one step over all of them: one step of
  the optimiser, of its schedule and of the multiplier. LeRobot's own step ignores that setting. The loop counts
  batches, so `--steps` is N times `train.steps`.
- With several processes each one takes its part of the anchors, and both gradients are averaged over the processes.
- LeRobot's checkpoints hold the multiplier as well, and `--resume` continues from them bit for bit.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lerobot.scripts.lerobot_train as loop
import torch
from lerobot.utils.constants import PRETRAINED_MODEL_DIR
from torch import Tensor

from craft_ray.config import Experiment
from craft_ray.lerobot.folder import folder_around
from craft_ray.lerobot.hook_data import SampleOrder, with_own_statistics
from craft_ray.lerobot.hook_settings import accumulated, check_experiment, check_settings
from craft_ray.lerobot.hook_state import CraftState, forget_state, load_state, save_state
from craft_ray.lerobot.kinds import policy_of
from craft_ray.lerobot.policy import LeRobotPolicy
from craft_ray.lerobot.tokenizers import complete_processor_config
from craft_ray.method.gradients import GradientPair
from craft_ray.retention.constraints import Constraints, open_constraints
from craft_ray.run.optimization import seed_step
from craft_ray.workers import OneWorker, ProcessGroup, Workers

logger = logging.getLogger(__name__)


@contextmanager
def craft_updates(experiment: Experiment) -> Iterator[CraftUpdate]:
    """While open, LeRobot's `train` takes CRaFT's step.

    Args:
        experiment: only these keys are used: `model.path` (the teacher's folder, which LeRobot trains), `craft` (and
            where it names none, the positions and layers of `anchors`), `seed`, `train.precision`, `train.accumulate`
            (micro-batches of the anchors of a step) and `train.steps` (the length of epsilon's schedule).

    Yields:
        What is called at each step; it remembers what each step measured.

    Raises:
        ConfigError: CRaFT is off, or the experiment names no anchor cache, or statistics to merge.
    """
    check_experiment(experiment)
    update, order = CraftUpdate(experiment), SampleOrder()
    ours = {
        "update_policy": update,
        "make_pre_post_processors": partial(with_own_statistics, loop.make_pre_post_processors),
        "make_optimizer_and_scheduler": partial(update.begin, loop.make_optimizer_and_scheduler),
        "compute_sampler_state": partial(order.compute_sampler_state, loop.compute_sampler_state),
        "cycle": partial(order.cycle, loop.cycle),
        "load_training_state": partial(update.load, loop.load_training_state),
        "save_checkpoint": partial(update.save, loop.save_checkpoint),
    }
    own = {name: getattr(loop, name) for name in ours}
    vars(loop).update(ours)
    try:
        yield update
    finally:
        vars(loop).update(own)
        update.close()


@dataclass(frozen=True)
class _TaskBatch:
    """A batch of LeRobot's loop."""

    content: Any
    count: int


@dataclass(frozen=True)
class _Opened:
    """The policy in training, and its constraints."""

    workers: Workers
    model: LeRobotPolicy
    constraints: Constraints
    gradients: GradientPair


class CraftUpdate:
    """Replaces LeRobot's `update_policy`."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.records: list[dict[str, float]] = []
        """For each step: task_loss, retention_loss, lambda, epsilon, dot, cos."""
        self._opened: _Opened | None = None
        self._resumed: CraftState | None = None
        self._collected: list[_TaskBatch] = []

    def close(self) -> None:
        """Remove the hooks and gradients from the policy."""
        if self._opened is not None:
            self._opened.gradients.close()
        self._opened, self._resumed, self._collected = None, None, []

    # -- around functions of LeRobot's loop, in the order in which it calls them

    def begin(self, own: Callable[..., Any], settings: Any, policy: Any) -> Any:
        """Around `make_optimizer_and_scheduler`: a schedule of the rate that runs over the steps of CRaFT.

        Raises:
            ConfigError: the loop's settings do not go with CRaFT's step.
        """
        self.close()
        check_settings(self.experiment, settings)
        settings = copy.copy(settings)  # the loop itself counts batches
        settings.steps //= accumulated()
        return own(settings, policy)

    def load(self, own: Callable[..., Any], checkpoint: Path, *arguments: Any, **named: Any) -> Any:
        """Around `load_training_state`.

        Raises:
            ConfigError: the checkpoint was saved without CRaFT, or its steps have another number of batches.
            StorageError: its state of CRaFT is damaged.
        """
        self._resumed = load_state(checkpoint, accumulated())
        return own(checkpoint, *arguments, **named)

    def save(self, own: Callable[..., Any], checkpoint_dir: Path, **named: Any) -> None:
        """Around `save_checkpoint`, which the loop calls in its first process."""
        assert self._opened is not None
        assert not self._collected, "a checkpoint lies between two steps"
        forget_state(checkpoint_dir)
        own(checkpoint_dir=checkpoint_dir, **named)
        complete_processor_config(checkpoint_dir / PRETRAINED_MODEL_DIR)  # so that LeRobot loads it on resume
        constraints, reached = self._opened.constraints.state_dicts(), self._opened.gradients.reached
        save_state(checkpoint_dir, CraftState(accumulated(), constraints, reached))

    def _open(self, policy: Any, processes: int) -> _Opened:
        """Open the cache for the policy as the loop made it: the teacher, unless the run is resumed."""
        config, resumed = self.experiment, self._resumed
        device = next(policy.parameters()).device
        workers = OneWorker(device) if processes == 1 else ProcessGroup(device)
        model = policy_of(config.model, config.train.precision, device, folder_around(config.model, policy))
        teacher = model.weights_fingerprint() if resumed is None else None
        constraints = open_constraints(config, model, teacher, workers)
        if resumed is None:
            constraints.check_untouched()
        else:
            constraints.load_state_dicts(resumed.constraints)
        for line in constraints.described() if workers.rank == 0 else ():
            logger.info(line)  # LeRobot's loop prints what is logged
        gradients = constraints.gradient_pair(model)
        if resumed is not None:
            gradients.restore_reached(resumed.reached)
        return _Opened(workers, model, constraints, gradients)

    def __call__(
        self,
        train_metrics: Any,
        policy: Any,
        batch: Any,
        optimizer: Any,
        grad_clip_norm: float,
        accelerator: Any,
        lr_scheduler: Any = None,
        lock: Any = None,
        sample_weighter: Any = None,
    ) -> tuple[Any, dict[str, float]]:
        """Collect one batch of LeRobot's loop, and take a step with the last of those that are accumulated.

        Raises:
            CacheRefused: the policy is not the cache's teacher, or the resumed run had another cache.
        """
        started = time.perf_counter()
        inner = accelerator.unwrap_model(policy)  # gradients are averaged here, not by DistributedDataParallel
        inner.train()
        if self._opened is None:
            self._opened = self._open(inner, accelerator.num_processes)
        self._collected.append(_TaskBatch(batch, self._opened.model.terms(batch)))
        measured: dict[str, float] = {}
        if len(self._collected) == accumulated():
            task, self._collected = self._collected, []
            step, rest = divmod(train_metrics.steps + 1, len(task))
            assert not rest, "the loop counts batches"
            assert accelerator.sync_gradients, "the loop itself accumulates gradients"
            measured = self._step(train_metrics, inner, task, step - 1, optimizer, grad_clip_norm, accelerator)
            if lr_scheduler is not None:
                lr_scheduler.step()
            train_metrics.lr = optimizer.param_groups[0]["lr"]
        train_metrics.update_s = time.perf_counter() - started
        return train_metrics, measured

    def _step(
        self, train_metrics: Any, policy: Any, task: list[_TaskBatch], step: int, optimizer: Any, max_norm: float,
        accelerator: Any,
    ) -> dict[str, float]:  # fmt: skip
        """Take a step (from 0), and enter what it measured in LeRobot's log."""
        assert self._opened is not None
        constraints, workers = self._opened.constraints, self._opened.workers

        def task_loss(part: _TaskBatch) -> Tensor:
            with accelerator.autocast():
                loss: Tensor = policy.forward(part.content)[0]
            return loss

        seed_step(self.experiment.seed, step, workers.rank)
        anchors = constraints.batches(step)
        metrics = constraints.update(
            task_loss,
            task,
            None if anchors is None else [part.to(workers.device) for part in anchors],
            step,
            optimizer=optimizer,
            gradients=self._opened.gradients,
            max_norm=max_norm if max_norm > 0 else None,
        )
        epsilons = constraints.epsilons(step)
        record = {
            "task_loss": float(metrics.task_loss),
            "retention_loss": float(metrics.retention_loss),
            "lambda": float(metrics.multiplier),
            "epsilon": epsilons[0] if len(epsilons) == 1 else math.nan,
            "dot": float(metrics.dot),
            "cos": float(metrics.cos),
            "weight": float(metrics.weight),
            "projected": float(metrics.projected),
        }
        self.records.append(record)
        train_metrics.loss = record["task_loss"]
        train_metrics.grad_norm = float(metrics.grad_norm)
        if workers.device.type == "cuda":
            train_metrics.gpu_mem_gb = torch.cuda.max_memory_allocated() / 1024**3
        # A mean over steps; if there is no retention step, nothing was measured.
        measured = {k: v for k, v in record.items() if math.isfinite(v)}
        train_metrics.update_metrics({k: v for k, v in measured.items() if k != "task_loss"})
        return measured
