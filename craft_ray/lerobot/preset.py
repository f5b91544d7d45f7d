"""The optimiser and the schedule of the learning rate that a policy's own config prescribes, built as LeRobot does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from lerobot.optim import AdamConfig, AdamWConfig
from torch.optim.lr_scheduler import LambdaLR

from craft_ray.errors import ConfigError
from craft_ray.models.capabilities import OptimizerPreset


def optimizer_preset(policy: Any, steps: int) -> OptimizerPreset:
    """What LeRobot's `make_optimizer_and_scheduler` builds by default, over the parameters that are trained.

    Args:
        policy: a LeRobot policy.
        steps: length of the run, to which LeRobot fits its schedules.

    Raises:
        ConfigError: the optimiser is neither Adam nor AdamW, or the schedule depends on more than the step.
    """
    settings = policy.config
    how, schedule = settings.get_optimizer_preset(), settings.get_scheduler_preset()
    if not isinstance(how, AdamConfig | AdamWConfig):
        raise ConfigError(
            f"the optimiser of a policy of type {settings.type} is {type(how).__name__}, and train.optimizer policy "
            f"takes AdamConfig and AdamWConfig: set train.optimizer=adamw"
        )
    optimizer = how.build(_trained(policy.get_optim_params()))
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    described = (
        f"optimizer of the policy: {type(optimizer).__name__}, learning rate {' and '.join(map(str, peaks))}, betas "
        f"{how.betas[0]} and {how.betas[1]}, eps {how.eps}, weight decay {how.weight_decay}, clipping "
        f"{f'to norm {how.grad_clip_norm}' if how.grad_clip_norm > 0 else 'off'}, rate {_schedule(schedule)}"
    )
    max_norm = float(how.grad_clip_norm) if how.grad_clip_norm > 0 else None
    if schedule is None:
        return OptimizerPreset(optimizer, lambda _: peaks, max_norm, described)
    scheduler = schedule.build(optimizer, steps)
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            f"the schedule of a policy of type {settings.type} is {type(schedule).__name__}, which is not a function "
            f"of the step alone: set train.optimizer=adamw"
        )
    factors = scheduler.lr_lambdas

    def rates(step: int) -> list[float]:
        return [peak * factor(step) for peak, factor in zip(peaks, factors, strict=True)]

    return OptimizerPreset(optimizer, rates, max_norm, described)


def _schedule(schedule: Any) -> str:
    """A schedule with everything that it depends on, because it decides numbers of the run."""
    if schedule is None:
        return "constant"
    settings = ", ".join(f"{key} {value}" for key, value in asdict(schedule).items())
    return f"{schedule.type} ({settings})"


def _trained(groups: Iterable[Any]) -> list[dict[str, Any]]:
    """The parameters, or groups of them, that LeRobot optimises, without those that are frozen."""
    items = list(groups)
    listed = items if items and isinstance(items[0], dict) else [{"params": items}]
    trained = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in listed]
    return [group for group in trained if group["params"]]
