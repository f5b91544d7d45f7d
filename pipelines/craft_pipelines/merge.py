"""`craft-ray merge`: a plain folder of a run, its adapter in the weights of its teacher or its parts put together."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from craft_pipelines.outputs import check_new_folder
from craft_ray.config import Experiment
from craft_ray.errors import ConfigError
from craft_ray.models import adapting, load_model
from craft_ray.models.adapter import CONFIG as ADAPTER
from craft_ray.run.checkpoint import save_model
from craft_ray.run.folder import RunFolder
from craft_ray.run.sharded_checkpoint import SHARDS, whole_model
from craft_ray.storage.last import last_checkpoint, through_last
from craft_ray.storage.paths import ObjectPath, StoragePath, copy_tree


def merge(path: StoragePath, out: StoragePath, say: Any = print) -> None:
    """Save the model of a run, with its adapter or its parts merged, into a new folder.

    Args:
        path: the run, whose last checkpoint is taken, or one of its checkpoints.

    Raises:
        ConfigError: there is no such run or checkpoint, it has nothing to merge, or `out` exists.
        ModelError: what was saved is not what was merged.
        StorageError: a part of it is damaged.
    """
    check_new_folder(out, "the model")
    run, checkpoint = checkpoint_of(path)
    config = run.config()
    if (checkpoint / SHARDS).exists():
        _merge_parts(checkpoint, config, out)
        say(f"merged the parts of {checkpoint}: {out}")
        return
    model_folder = checkpoint / "model"
    if not (model_folder / ADAPTER).exists():
        raise ConfigError(f"{model_folder} is a whole model already, its run trained no adapter: use it as it is")
    model = load_model(config.model.on_host, config.train.precision, weights=str(model_folder))
    adapting.merge(model)
    save_model(config.model, config.train.precision, model, out, "merged")
    say(f"merged the adapter of {checkpoint} into {config.model.path}: {out}")


def _merge_parts(checkpoint: StoragePath, config: Experiment, out: StoragePath) -> None:
    """Save the model that a sharded checkpoint holds. One in a store is first copied to this node."""
    with tempfile.TemporaryDirectory(prefix="craft-ray-merge-") as scratch:
        local = checkpoint if isinstance(checkpoint, Path) else Path(scratch) / checkpoint.name
        if not isinstance(checkpoint, Path):
            copy_tree(checkpoint, local)
        model = whole_model(local, config.model, config.train.precision)
        save_model(config.model, config.train.precision, model, out, "merged")


def checkpoint_of(path: StoragePath) -> tuple[RunFolder, StoragePath]:
    """A run and its last checkpoint, or the given one.

    Raises:
        ConfigError: there is no such run or checkpoint.
    """
    path = through_last(path) if isinstance(path, ObjectPath) else path
    is_run = (path / "config.yaml").exists()
    checkpoint = last_checkpoint(RunFolder(path).checkpoints) if is_run else path.resolve()
    if checkpoint is None or not ((checkpoint / "model").exists() or (checkpoint / SHARDS).exists()):
        raise ConfigError(
            f"{path} is neither a run with a checkpoint (train.keep_checkpoints > 0) nor a checkpoint of one: specify "
            f"one of them"
        )
    return RunFolder(path if is_run else checkpoint.parent.parent), checkpoint
