"""Trackers that receive the metrics of a run in addition to its folder."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import model_validator

from craft_ray.config.paths import TrackingUri
from craft_ray.config.types import Section


class TrackingConfig(Section):
    """Trackers that receive metrics in addition to the run folder. TensorBoard events are always written."""

    mlflow: TrackingUri | None = None
    """MLflow's tracking URI, e.g. `sqlite:///mlflow.db`. Needs the extra `mlflow`."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; `offline` writes files for `wandb sync`. Needs the extra `wandb`."""
    trackio: Literal["off", "local"] = "off"
    """trackio; `local` writes the SQLite file that `trackio show` reads. Needs the extra `trackio`."""
    project: str = "craft-ray"
    """MLflow's experiment, or the project of Weights & Biases and of trackio."""

    @model_validator(mode="after")
    def _without_secrets(self) -> Self:
        if self.mlflow is not None and re.search(r"://[^/\s]*@", self.mlflow):
            raise ValueError(
                "mlflow contains a password, but a config is saved in every run folder: set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self
