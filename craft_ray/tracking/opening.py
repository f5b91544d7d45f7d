"""Opens the trackers that a config asks for."""

from __future__ import annotations

from pathlib import Path

from craft_ray.config import TrackingConfig
from craft_ray.errors import ConfigError
from craft_ray.storage.paths import StoragePath
from craft_ray.tracking.mlflow import MlflowTracker
from craft_ray.tracking.tracker import Tracker
from craft_ray.tracking.trackio import TrackioTracker
from craft_ray.tracking.wandb import WandbTracker


def open_trackers(config: TrackingConfig, folder: StoragePath) -> list[Tracker]:
    """The trackers that `config` asks for; none if all are off.

    Args:
        folder: where Weights & Biases keeps its files.

    Raises:
        ConfigError: a package is missing, or a server does not answer or refuses access.
    """
    trackers: list[Tracker] = []
    if config.mlflow is not None:
        trackers.append(MlflowTracker(config.mlflow, config.project))
    if config.wandb != "off":
        if not isinstance(folder, Path):
            raise ConfigError(
                f"tracking.wandb keeps files in the run folder while it runs, and {folder} is in an object store: "
                f"choose an output folder on a disk or a mount, or track with MLflow"
            )
        trackers.append(WandbTracker(config.wandb, config.project, folder))
    if config.trackio != "off":
        trackers.append(TrackioTracker(config.project))
    return trackers
