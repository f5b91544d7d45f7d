"""The objective of a sweep, and its search."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from craft_ray.config.types import Bound, Section, SmallSeed


class ObjectiveConfig(Section):
    """The objective of a sweep, over any logged metric (docs/sweeps.md)."""

    maximize: str | None = None
    minimize: str | None = None
    """Specify one of the two: `new/score`, `new/ratio`, `train/loss`, ..."""
    subject_to: dict[str, Bound] = {}
    """Bounds, e.g. `{old/ratio: ">= 0.95"}`. A setting that meets all bounds ranks above each that does not."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """With several seeds, the one-sided confidence bound of the mean at this level has to meet the bound."""

    @property
    def metric(self) -> str:
        metric = self.minimize if self.maximize is None else self.maximize
        assert metric is not None
        return metric

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("specify one metric, either under maximize or under minimize")
        return self


class SweepConfig(Section):
    """How a sweep searches. The search space is a separate file (`--space`)."""

    samples: int = Field(16, ge=1)
    """Number of settings to try; for each point of the grid, if the space has one."""
    sampler: Literal["random", "tpe"] = "random"
    """`tpe` is Optuna's tree-structured Parzen estimator with constraints; it learns from earlier trials."""
    seed: SmallSeed = 0
    """Seed of the sampler: the same seed draws the same settings."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """Which trials are stopped early (asha, median), or continue from a better trial's weights (pbt)."""
    grace: int = Field(1, ge=1)
    """Validations before a trial may be stopped, or between two changes by pbt."""
    reduction_factor: int = Field(3, ge=2)
    """One in this many trials continues past each rung of asha."""
    repeat: int = Field(1, ge=1)
    """Number of seeds for each setting; it is ranked by their mean."""
    parallel: int | None = Field(None, ge=1)
    """Concurrent trials. Default: as many as the cluster has processors and memory for."""
    max_failures: int = Field(1, ge=0)
    """How often a crashed trial is retried before it is marked as failed. A trial that is lost with its node is always
    retried."""
