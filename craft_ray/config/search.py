"""What a sweep searches for, and how."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from craft_ray.config.types import Bound, Section


class ObjectiveConfig(Section):
    """What a sweep searches for, over any logged metric (docs/sweeps.md)."""

    maximize: str | None = None
    minimize: str | None = None
    """Name either of them: `new/score`, `new/ratio`, `train/loss`, ..."""
    subject_to: dict[str, Bound] = {}
    """Bounds, e.g. `{old/ratio: ">= 0.95"}`. A setting within all bounds ranks above every setting that is not."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """With several seeds a bound has to be kept by the one-sided confidence bound of the mean at this level."""

    @property
    def metric(self) -> str:
        metric = self.minimize if self.maximize is None else self.maximize
        assert metric is not None
        return metric

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("name one metric, either under maximize or under minimize")
        return self


class SweepConfig(Section):
    """How a sweep searches. What it searches over is a file of its own (`--space`)."""

    samples: int = Field(16, ge=1)
    """Settings that are tried; for each point of the grid, where the space has one."""
    sampler: Literal["random", "tpe"] = "random"
    """`tpe` is Optuna's tree-structured Parzen estimator with constraints; it learns from the trials before."""
    seed: int = Field(0, ge=0)
    """Of the sampler: the same seed draws the same settings."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """Which trials are stopped early (asha, median), or go on from a better one's weights (pbt)."""
    grace: int = Field(1, ge=1)
    """Looks at the validation data before a trial may be stopped, or between two changes by pbt."""
    reduction_factor: int = Field(3, ge=2)
    """One in so many trials goes on past each rung of asha."""
    repeat: int = Field(1, ge=1)
    """Seeds of each setting; it is ranked by their mean."""
    parallel: int | None = Field(None, ge=1)
    """Trials at once. Default: as many as the cluster holds."""
    max_failures: int = Field(1, ge=0)
    """Times that a crashed trial is tried again before it is marked as failed. One that is lost with its node is always
    tried again."""
