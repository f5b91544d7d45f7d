"""What a run is: the config, the task data and the model that it began with.

Both are recorded in the run's folder before the first step, and compared whenever the run is taken up again. What
decides no number may change on the way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from craft_ray.config import Experiment, Mixture, deciding_difference, parse_config
from craft_ray.config.differences import FREE
from craft_ray.errors import ConfigError, StorageError
from craft_ray.models.base import Model
from craft_ray.models.fingerprint import files_fingerprint
from craft_ray.run.folder import RunFolder
from craft_ray.storage.files import write_atomically
from craft_ray.storage.node_cache import local_copy

RECORD = "identity.json"


@dataclass(frozen=True)
class ModelIdentity:
    """The model at `model.path`, before fine-tuning."""

    samples: str | None
    """Hash of everything that prepares a sample: tokenizer, processor, limits. None if no model is loaded."""
    files: str | None
    """Hash over its weight files, which a resumed run does not load; None for a model on the hub."""
    weights: str | None
    """Hash of its weights; None if they are not loaded."""


@dataclass(frozen=True)
class RunIdentity:
    """The record of a run."""

    config: Experiment
    task: str
    """Hash of the task data and of how they are read."""
    model: ModelIdentity | None
    """None for a run that began with a version that did not record it."""


def read_identity(folder: RunFolder) -> RunIdentity | None:
    """The record of a run; None if it has not begun, or began with a version that kept none.

    Raises:
        StorageError: the record is damaged.
    """
    path = folder.path / RECORD
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text())
        model = ModelIdentity(**tree["model"]) if tree.get("model") else None
        return RunIdentity(parse_config(tree["config"], str(path)), str(tree["task"]), model)
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{path} is damaged: restore it, or start a new run") from None


def config_difference(folder: RunFolder, config: Experiment) -> str | None:
    """The first key that decides numbers and is not what a run began with, with both values; None if all are."""
    recorded = read_identity(folder)
    original = folder.config() if recorded is None else recorded.config
    return deciding_difference(original, config, places=recorded is None)


def check_config(folder: RunFolder, config: Experiment) -> None:
    """Check that a run that has begun may be taken up with a config.

    Raises:
        ConfigError: the run began with another config.
    """
    difference = config_difference(folder, config)
    if difference is not None:
        raise ConfigError(
            f"the run {folder.home} started with another config ({difference}): continue it with its own, or start a "
            f"new run with another name=... or seed=...; only what decides no number may change ({', '.join(FREE)})"
        )


def task_name(config: Experiment) -> str:
    """The task data in a message."""
    if isinstance(config.task, Mixture):
        return "one of the sources in task.mix"
    return f"task.path {config.task.path}"


def check_task(folder: RunFolder, config: Experiment, fingerprint: str) -> None:
    """Check that a run that has begun may be taken up with task data.

    Raises:
        ConfigError: the run began with other data.
    """
    recorded = read_identity(folder)
    if recorded is not None:
        remedy = "start a new run with another name=... or seed=..."
        check_same_data(task_name(config), recorded.task, fingerprint, f"the run {folder.home}", remedy)


def model_files(config: Experiment) -> str | None:
    """Hash over the weight files of the model that a config names; None for a model on the hub."""
    return files_fingerprint(Path(local_copy(config.model.path, "model.path")))


def model_identity(config: Experiment, model: Model, weights: str | None) -> ModelIdentity:
    """The identity of the loaded model of a run.

    Args:
        weights: hash of its weights before fine-tuning; None if it has a checkpoint's.
    """
    return ModelIdentity(model.sample_fingerprint(), model_files(config), weights)


def check_model(folder: RunFolder, config: Experiment, model: ModelIdentity) -> None:
    """Check that a run that has begun may be taken up with a model; what is not known of one is not compared.

    Raises:
        ConfigError: the run began with another model.
    """
    recorded = read_identity(folder)
    if recorded is None or recorded.model is None:
        return
    for what, theirs, ours in (
        ("weights", recorded.model.weights, model.weights),
        ("weight files", recorded.model.files, model.files),
        ("tokenizer, processor and limits", recorded.model.samples, model.samples),
    ):
        if theirs is not None and ours is not None and theirs != ours:
            raise ConfigError(
                f"model.path {config.model.path} is not what it was when the run {folder.home} began: its {what} had "
                f"the fingerprint {theirs[:12]}, and now have {ours[:12]}: restore it, or start a new run with another "
                f"name=... or seed=..."
            )


def check_same_data(named: str, recorded: str, fingerprint: str, begun: str, remedy: str) -> None:
    """Check that data are those that a run or a sweep began with.

    Args:
        named: the data, by their key.
        recorded: the hash that they had.
        begun: the run or the sweep, in a message.
        remedy: what can be done with other data.

    Raises:
        ConfigError: they are different.
    """
    if recorded != fingerprint:
        raise ConfigError(
            f"{named} is not what it was when {begun} began: its data had the fingerprint {recorded[:12]}, and "
            f"now have {fingerprint[:12]}: restore them, or {remedy}"
        )


def check_same(folder: RunFolder, config: Experiment, task: str, model: ModelIdentity) -> None:
    """Check that a run is what it was, if it has begun.

    Args:
        task: hash of the task data.

    Raises:
        ConfigError: it began with another config, other task data or another model.
    """
    if folder.started:
        check_config(folder, config)
        check_task(folder, config, task)
        check_model(folder, config, model)


def record(folder: RunFolder, config: Experiment, task: str, model: ModelIdentity) -> None:
    """Record what a run is from now on. The caller holds the run's lock and has checked everything, so that what is
    trained in the folder is what its `config.yaml` says."""
    before = read_identity(folder)
    if model.weights is None and before is not None and before.model is not None:
        model = replace(model, weights=before.model.weights)
    folder.write_config(config)
    tree = {"config": config.model_dump(mode="json"), "task": task, "model": asdict(model)}
    write_atomically(folder.path / RECORD, json.dumps(tree, indent=2))


def forget_identity(folder: RunFolder) -> None:
    """Let a run continue as another one: population based training gives a trial another setting on its way."""
    (folder.path / RECORD).unlink(missing_ok=True)
