"""Which experiments, and which settings of LeRobot's training loop, go with CRaFT's step in it."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, GradientState

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError

REPLICATED = ("NO", "MULTI_CPU", "MULTI_GPU")
"""Kinds of accelerate's processes in which each process holds all weights."""


def accumulated() -> int:
    """Over how many batches accelerate's settings accumulate gradients."""
    return int(GradientState().num_steps)


def check_experiment(experiment: Experiment) -> None:
    """
    Raises:
        ConfigError: CRaFT is off, or the experiment names no anchor cache, a part to keep, or statistics to merge.
    """
    if not experiment.craft.enabled or experiment.craft.anchor_cache_dir is None:
        raise ConfigError("craft_updates needs craft.enabled and craft.anchor_cache_dir: build a cache and name it")
    for skill, keep in experiment.kept_parts().items():
        raise ConfigError(
            f"{experiment.keep_key(skill)} {keep} follows validations, and LeRobot's loop runs none: hold L_ret to "
            f"craft.epsilon_start, or train with craft-ray train"
        )
    if experiment.model.merge_statistics:
        raise ConfigError(
            "craft_updates leaves LeRobot's processors with the teacher's statistics, and model.merge_statistics would "
            "normalise the anchors with others: leave it out, or save a teacher with the merged ones first"
        )


def check_settings(experiment: Experiment, settings: Any) -> None:
    """
    Args:
        settings: LeRobot's `TrainPipelineConfig`.

    Raises:
        ConfigError: they are incompatible with CRaFT's step, or with the experiment.
    """
    processes, together = AcceleratorState(), accumulated()
    kind, number = str(processes.distributed_type.value), processes.num_processes
    if settings.sample_weighting is not None:
        raise ConfigError("craft_updates steps without sample weights: leave LeRobot's sample_weighting out")
    if kind not in REPLICATED:
        raise ConfigError(
            f"craft_updates needs all weights in each process, accelerate runs {kind}: launch without it (--multi_gpu)"
        )
    if processes.mixed_precision == "fp16":
        raise ConfigError(
            "craft_updates does not scale the loss, which float16 needs: train the policy in bfloat16 or float32"
        )
    steps, rest = divmod(settings.steps, together)
    if rest or (settings.save_checkpoint and settings.save_freq > 0 and settings.save_freq % together):
        raise ConfigError(
            f"LeRobot's --steps {settings.steps} and --save_freq {settings.save_freq} count batches, of which "
            f"{together} are accumulated in a step: choose multiples of {together}"
        )
    if steps > experiment.train.steps:
        raise ConfigError(
            f"LeRobot's loop takes {steps} steps, more than train.steps={experiment.train.steps}, over which epsilon's "
            f"schedule runs: set train.steps to {steps}"
        )
    size, parts = experiment.craft.anchor_batch_size, number * experiment.train.accumulate
    if size % parts:
        raise ConfigError(
            f"craft.anchor_batch_size {size} does not divide over {number} process(es) of accelerate times "
            f"{experiment.train.accumulate} micro-batch(es) (train.accumulate): choose a multiple of {parts}"
        )
