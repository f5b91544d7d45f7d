"""CRaFT's step in LeRobot's own training loop.

    with craft_updates(load_config("run.yaml")):
        lerobot_train.train(...)

LeRobot's loop keeps its data, its optimiser, its schedule, its logs and its checkpoints; while this is open it takes
CRaFT's step in place of its own, and leaves the teacher's normaliser statistics as they are. It begins runs in one
process; it does not go on with one, for LeRobot's checkpoints do not hold the multiplier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lerobot.scripts.lerobot_train as loop
import torch
from torch import Tensor

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError
from craft_ray.lerobot.folder import folder_around
from craft_ray.lerobot.policy import policy_of
from craft_ray.method.gradients import GradientPair
from craft_ray.retention.constraint import Constraint, open_mode
from craft_ray.retention.update import update
from craft_ray.workers import OneWorker


@contextmanager
def craft_updates(experiment: Experiment) -> Iterator[CraftUpdate]:
    """While open, LeRobot's `train` takes CRaFT's step.

    Args:
        experiment: of it, `model.path` (the teacher's folder, which LeRobot trains), `craft` (and where it names none,
            the positions and layers of `anchors`), `seed`, `train.precision` and `train.steps` count. The last is the
            length of epsilon's schedule: give LeRobot's loop the same.

    Yields:
        What is called at each step; it remembers what each step measured.

    Raises:
        ConfigError: CRaFT is off, or the experiment names no anchor cache, or statistics to merge.
    """
    if not experiment.craft.enabled or experiment.craft.anchor_cache_dir is None:
        raise ConfigError("craft_updates needs craft.enabled and craft.anchor_cache_dir: build a cache and name it")
    if experiment.model.merge_statistics:
        raise ConfigError(
            "craft_updates leaves LeRobot's processors with the teacher's statistics, and model.merge_statistics would "
            "have the anchors see others: leave it out, or save a teacher with the merged ones first"
        )
    update = CraftUpdate(experiment)
    own = loop.update_policy, loop.make_pre_post_processors
    loop.update_policy, loop.make_pre_post_processors = update, _with_own_statistics
    try:
        yield update
    finally:
        loop.update_policy, loop.make_pre_post_processors = own
        update.close()


def _with_own_statistics(**arguments: Any) -> Any:
    """LeRobot's processors without the new data set's statistics, which it would put in the place of the teacher's."""
    for name in ("preprocessor_overrides", "postprocessor_overrides"):
        for step in ("normalizer_processor", "unnormalizer_processor"):
            arguments.get(name, {}).get(step, {}).pop("stats", None)
    return own_processors(**arguments)


own_processors = loop.make_pre_post_processors


@dataclass(frozen=True)
class _TaskBatch:
    """A batch of LeRobot's loop."""

    content: Any
    count: int = 1


class CraftUpdate:
    """In the place of LeRobot's `update_policy`."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.records: list[dict[str, float]] = []
        """Of each step: task_loss, retention_loss, lambda, epsilon, dot, cos."""
        self._begun = False

    def close(self) -> None:
        """Give the policy back without hooks and gradients."""
        if self._begun:
            self.gradients.close()

    def _begin(self, policy: Any) -> None:
        """Open the cache for the policy as the loop made it, and check that it still is the teacher."""
        config = self.experiment
        device = next(policy.parameters()).device
        self.workers = OneWorker(device)
        model = policy_of(config.model, config.train.precision, device, folder_around(config.model, policy))
        self.constraint = Constraint(config, open_mode(config, model, model.weights_fingerprint()), self.workers)
        self.constraint.check_untouched()
        self.gradients = GradientPair(policy.named_parameters())
        self._begun = True

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
        """One step, as LeRobot's loop asks for it.

        Raises:
            ConfigError: the loop runs in several processes, or weighs its samples.
            CacheRefused: the policy is not the cache's teacher.
        """
        started = time.perf_counter()
        if accelerator.num_processes > 1 or sample_weighter is not None:
            raise ConfigError(
                "craft_updates steps in one process and without sample weights: use craft-ray train for several workers"
            )
        inner = accelerator.unwrap_model(policy)
        if not self._begun:
            inner.train()
            self._begin(inner)
        inner.train()
        config, step = self.experiment, len(self.records)
        if step >= config.train.steps:
            raise ConfigError(
                f"LeRobot's loop takes more steps than train.steps={config.train.steps}, over which epsilon's schedule "
                f"runs: set train.steps to LeRobot's --steps"
            )

        def task_loss(part: _TaskBatch) -> Tensor:
            with accelerator.autocast():
                loss: Tensor = inner.forward(part.content)[0]
            return loss

        anchors = self.constraint.batches(step)
        epsilon = self.constraint.epsilon(step)
        metrics = update(
            task_loss,
            [_TaskBatch(batch)],
            [self.constraint],
            None if anchors is None else [part.to(self.workers.device) for part in anchors],
            step,
            optimizer=optimizer,
            gradients=self.gradients,
            workers=self.workers,
            max_norm=grad_clip_norm if grad_clip_norm > 0 else None,
        )
        if lr_scheduler is not None:
            lr_scheduler.step()
        record = {
            "task_loss": float(metrics.task_loss),
            "retention_loss": float(metrics.retention_loss),
            "lambda": float(metrics.multiplier),
            "epsilon": epsilon,
            "dot": float(metrics.dot),
            "cos": float(metrics.cos),
        }
        self.records.append(record)
        train_metrics.loss = record["task_loss"]
        train_metrics.grad_norm = float(metrics.grad_norm)
        train_metrics.lr = optimizer.param_groups[0]["lr"]
        train_metrics.update_s = time.perf_counter() - started
        if self.workers.device.type == "cuda":
            train_metrics.gpu_mem_gb = torch.cuda.max_memory_allocated() / 1024**3
        # A mean over steps; where there is no retention step, nothing was measured.
        measured = {k: v for k, v in record.items() if math.isfinite(v)}
        train_metrics.update_metrics({k: v for k, v in measured.items() if k != "task_loss"})
        return train_metrics, measured
