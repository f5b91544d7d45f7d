"""Where numbers go beside the run folder."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import model_validator

from craft_ray.config.paths import TrackingUri
from craft_ray.config.types import Section


class TrackingConfig(Section):
    """Where numbers go beside the run folder. TensorBoard events are always written."""

    mlflow: TrackingUri | None = None
    """MLflow's tracking URI, e.g. `sqlite:///mlflow.db`. Needs the extra `mlflow`."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; `offline` writes files for `wandb sync`. Needs the extra `wandb`."""
    project: str = "craft-ray"
    """The experiment of MLflow, the project of Weights & Biases."""

    @model_validator(mode="after")
    def _without_secrets(self) -> Self:
        if self.mlflow is not None and re.search(r"://[^/\s]*@", self.mlflow):
            raise ValueError(
                "mlflow holds a password, and a config is written into every run folder: set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self
