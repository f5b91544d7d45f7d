"""Which trials continue: Ray Tune's schedulers, with the score that respects the bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from craft_pipelines.sweep.trial import TRIAL
from craft_ray.errors import ConfigError
from craft_ray.sweep.trials import Plan, SweepFolder

FIXED = (
    "seed", "train.steps", "craft.enabled", "craft.retention_mode", "craft.loss_type", "craft.positions",
    "craft.layers",
)  # fmt: skip
"""What a checkpoint depends on, so population based training cannot change it during training."""


class MedianNow(MedianStoppingRule):
    """Stops a trial whose score is below the median of the others' scores at that step.

    Ray's rule compares a trial's best score so far with the others' running means. A student starts within the bounds,
    because it starts as the teacher, so its best score would stay feasible whatever it forgets later.
    """

    def _best_result(self, trial: Trial) -> float:
        return float(self._results[trial][-1][self._metric])

    def _running_mean(self, trial: Trial, time: float) -> float:  # type: ignore[override]  # a number
        return float([result for result in self._results[trial] if result[self._time_attr] <= time][-1][self._metric])


def check_scheduler(plan: Plan) -> None:
    """Refuse a scheduler that has nothing to act on.

    Raises:
        ConfigError: there are too few validations, or PBT would have to copy what it cannot.
    """
    config, sweep = plan.config, plan.config.sweep
    if sweep.scheduler == "none":
        return
    every, steps = config.validation.every, config.train.steps
    if not 0 < every < steps:
        raise ConfigError(
            f"sweep.scheduler {sweep.scheduler} acts at each validation, and validation.every is {every} of "
            f"{steps} steps: set it to e.g. {max(1, steps // 6)}, or use sweep.scheduler=none"
        )
    if sweep.grace * every >= longest(plan):
        raise ConfigError(
            f"sweep.grace {sweep.grace} times validation.every {every} is not less than a run's {longest(plan)} steps, "
            f"so sweep.scheduler {sweep.scheduler} would never act: make either smaller, or use sweep.scheduler=none"
        )
    if sweep.scheduler == "pbt":
        if config.workers.most > 1:
            raise ConfigError("sweep.scheduler pbt copies trials of one process: set workers.num_workers to 1")
        if sweep.sampler != "random":
            raise ConfigError(f"sweep.scheduler pbt draws its settings itself: leave sweep.sampler={sweep.sampler} out")
        if sweep.parallel is not None:
            raise ConfigError("sweep.scheduler pbt takes turns on the whole cluster: leave sweep.parallel out")
        if sweep.repeat > 1:
            raise ConfigError("sweep.scheduler pbt changes a setting during training: leave sweep.repeat out")
        fixed = [key for key in plan.space.knobs if key in FIXED or key.startswith("adapter.")]
        if fixed or len(plan.space.grid()) > 1:
            raise ConfigError(f"sweep.scheduler pbt cannot change {', '.join(fixed) or 'a grid'} during training")


def scheduler_of(folder: SweepFolder, plan: Plan) -> TrialScheduler:
    """The scheduler that the config asks for."""
    config, sweep = plan.config, plan.config.sweep
    grace = sweep.grace * config.validation.every
    if sweep.scheduler == "asha":
        return ASHAScheduler(
            time_attr="step",
            max_t=longest(plan) * sweep.repeat,
            grace_period=grace,
            reduction_factor=sweep.reduction_factor,
        )
    if sweep.scheduler == "median":
        never = float("inf")  # no trial is paused to make room: that would need a checkpoint
        return MedianNow(time_attr="step", grace_period=grace, min_samples_required=3, min_time_slice=never)  # type: ignore[arg-type]
    if sweep.scheduler == "pbt":
        rng = np.random.default_rng(sweep.seed)

        def explore(chosen: dict[str, Any]) -> dict[str, Any]:
            # A better trial's config: with its settings if it was changed before; otherwise they are in its folder.
            number = chosen[TRIAL]
            params = {key: value for key, value in chosen.items() if key != TRIAL} or folder.trial(number).params()
            assert params is not None
            return {TRIAL: number, **plan.space.near(config, params, rng)}

        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=grace,
            custom_explore_fn=explore,
            log_config=False,
        )
    return FIFOScheduler()


def longest(plan: Plan) -> int:
    """The most steps that a run of the sweep can have."""
    searched = [steps for case in plan.space.knobs.get("train.steps", ()) for steps in case.corners()]
    return max([plan.config.train.steps, *map(int, searched)])
