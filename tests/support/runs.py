"""Runs in the test's process."""

from __future__ import annotations

from pathlib import Path

from craft_ray.config import Experiment
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker


def trained(config: Experiment, path: Path) -> RunFolder:
    """A run in a new folder, trained to its end."""
    folder = RunFolder(path)
    folder.begin(config, ["test"])
    train(config, folder, OneWorker(), NullObserver())
    return folder
