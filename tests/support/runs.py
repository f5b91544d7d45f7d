"""Runs in the test's process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from craft_ray.config import Experiment
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import Record
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker, Workers


def trained(config: Experiment, path: Path) -> RunFolder:
    """A run in a new folder, trained to its end."""
    folder = RunFolder(path)
    folder.begin(config, ["test"])
    train(config, folder, OneWorker(), NullObserver())
    return folder


def trained_together(workers: Workers, config: Experiment, path: Path) -> None:
    """A run of several workers in a new folder, trained to its end. Each of them calls this."""
    folder = RunFolder(path)
    if workers.rank == 0:
        folder.begin(config, ["test"])
    workers.gather(None)
    train(config, folder, workers, NullObserver())


def weights(folder: RunFolder) -> dict[str, Tensor]:
    """The weights in a run's last checkpoint."""
    return load_file(folder.checkpoints / "last" / "model" / "model.safetensors")


def measured(folder: RunFolder) -> list[Record]:
    """The records of a run without its times."""
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in folder.read_metrics()]


def apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """How far two runs from one start end from each other, relative to how far they went.

    It is a ratio of norms over all weights. Single weights cannot be compared: the gradient of some, such as the biases
    of attention keys, is zero but for rounding, and AdamW makes steps of full length out of rounding.
    """
    assert ours.keys() == theirs.keys() == start.keys()
    between, gone = (
        torch.cat([(a[name].double() - b[name].double()).flatten() for name in start]).norm()
        for a, b in ((ours, theirs), (theirs, start))
    )
    return float(between / gone)
