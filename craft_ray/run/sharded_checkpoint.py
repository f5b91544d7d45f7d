"""Checkpoints of sharded runs: every worker writes and reads its own part, in the format of torch's distributed
checkpoint, which any number of workers can read.

    step_NNNNNN/sharded/          weights and moments, by name
    step_NNNNNN/training_state/   everything else that the next step depends on
    step_NNNNNN/files.json        size and checksum of each file of both
    step_NNNNNN/model/            at the last step: a folder that `from_pretrained` loads

The folder appears when all workers have written their parts, as a whole or not at all.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from craft_ray.config import ModelConfig, Precision
from craft_ray.errors import ModelError, StorageError, first_line
from craft_ray.method.gradients import GradientPair
from craft_ray.models import load_model
from craft_ray.models.base import Model
from craft_ray.models.sharding import shard_of
from craft_ray.run.checkpoint import TrainingState, checkpoint_name, checkpoint_step, load_training_state, state_file
from craft_ray.storage.files import checksum, clear_leftovers, new_folder
from craft_ray.storage.last import point_last
from craft_ray.workers import OneWorker, ProcessGroup, Workers

SHARDS = "sharded"
FILES = "files.json"


def begin_sharded(
    folder: Path,
    model: Model,
    state: TrainingState,
    gradients: GradientPair,
    optimizer: Optimizer,
    workers: Workers,
    keep: int,
    *,
    export: bool,
    apart: bool,
    beside: ProcessGroup | None = None,
) -> Callable[[], Path]:
    """Begin a checkpoint with all workers.

    Args:
        state: its `optimizer` is the optimiser's state; the moments in it are written by name.
        export: whether the checkpoint gets a `model` folder.
        apart: whether each worker has a `folder` of its own, and its part of the checkpoint in it (`RunMirror`).
        beside: the workers as a group of their own. With it, the tensors are copied to the host, and training may
            continue while they are written.

    Returns:
        What completes it on each worker, and may be called in another thread with `beside`: it points `last` at the
        checkpoint, and removes all but the latest `keep`.

    Raises:
        StorageError: a worker could not write its part. Earlier checkpoints are untouched.
    """
    target, main = folder / checkpoint_name(state.step), workers.rank == 0
    owner = main or apart
    if owner:
        clear_leftovers(folder)
    rest = copy.deepcopy(vars(state) | {"optimizer": _without_moments(state.optimizer)})
    with ExitStack() as opened:
        own = opened.enter_context(new_folder(target)) if owner else None
        first: Path = workers.gather(own)[0]
        temporary = own or first
        with _writing(target):
            parts = _write_parts(temporary, named_tensors(model, gradients, optimizer), beside)
            if export:
                model.save(temporary / "model", final=target / "model")
        stack = opened.pop_all()

    def complete() -> Path:
        with stack, _writing(target):
            parts()
            written = _described_by_all(temporary, beside or workers)
            if main:
                state_file(temporary).parent.mkdir()
                torch.save(rest, state_file(temporary))
                written |= _described(temporary, state_file(temporary))
                (temporary / FILES).write_text(json.dumps(written, indent=1))
        if owner:
            point_last(folder, target.name)
            for old in sorted(folder.glob("step_*"), key=checkpoint_step)[:-keep]:
                shutil.rmtree(old)
        return target

    return complete


def is_sharded(checkpoint: Path) -> bool:
    return (checkpoint / SHARDS).exists()


def restore(
    checkpoint: Path, model: Model, gradients: GradientPair, optimizer: Optimizer, workers: Workers
) -> TrainingState:
    """Restore the optimiser, and the weights if the checkpoint is sharded, whether this run is sharded or not; the
    weights of others are in `model`, which the caller loads.

    Returns:
        The rest of what was saved.

    Raises:
        StorageError: a file of the checkpoint is missing or not what was written.
    """
    if is_sharded(checkpoint):
        check_files(checkpoint, workers)
    state = load_training_state(checkpoint)
    moments = state.optimizer["state"]
    for index, p in enumerate(gradients.parameters):
        for key, value in moments.get(index, {}).items():
            if value is None:
                moments[index][key] = torch.zeros_like(p, requires_grad=False)
            elif value.ndim:
                moments[index][key] = shard_of(value, p)
    optimizer.load_state_dict(state.optimizer)
    if is_sharded(checkpoint):
        read_parts(checkpoint, named_tensors(model, gradients, optimizer))
    return state


def read_parts(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Read tensors by name, in place: of a sharded tensor this worker's part.

    Raises:
        StorageError: the checkpoint lacks one, or its files are damaged.
    """
    try:
        with _quiet():
            reader = dcp.FileSystemReader(checkpoint / SHARDS)
            dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, OSError, ValueError) as error:
        raise StorageError(f"checkpoint {checkpoint} does not load ({_cause(error)}): {_REMEDY}") from None


_REMEDY = "restore it from a copy, or make the link `last` beside it point to an earlier one"


def check_files(checkpoint: Path, workers: Workers) -> None:
    """Check that every file of a sharded checkpoint is what was written. The workers divide them among themselves.

    Raises:
        StorageError: one is missing or has changed.
    """
    listing = checkpoint / FILES
    try:
        expected: dict[str, Any] = json.loads(listing.read_text())
    except (OSError, ValueError):
        raise StorageError(f"checkpoint {checkpoint}: {FILES} is missing or damaged: {_REMEDY}") from None
    wrong = None
    for name in sorted(expected)[workers.rank :: workers.world_size]:
        file = checkpoint / name
        if not file.exists():
            wrong = wrong or f"{name} is missing"
        elif [file.stat().st_size, checksum(file)] != expected[name]:
            wrong = wrong or f"{name} is not what was written"
    found = [message for message in workers.gather(wrong) if message is not None]
    if found:
        raise StorageError(f"checkpoint {checkpoint}: {found[0]}: {_REMEDY}")


def check_exported(config: ModelConfig, precision: Precision, trained: str, folder: Path) -> None:
    """Load the `model` folder of a sharded run, and compare its weights with those that were trained.

    Args:
        trained: the hash of those.

    Raises:
        ModelError: it holds other weights.
    """
    if load_model(config.on_host, precision, "cpu", weights=str(folder)).weights_fingerprint() != trained:
        raise ModelError(
            f"{folder} is not what was trained: its weights differ when it is loaded again, so the save_pretrained of "
            f"this model does not fit its from_pretrained: choose another model or version of transformers; what was "
            f"trained is in {folder.parent / SHARDS}"
        )


def whole_model(checkpoint: Path, config: ModelConfig, precision: Precision) -> Model:
    """The model that a sharded checkpoint holds, in one process.

    Raises:
        StorageError: a file of it is missing or not what was written.
    """
    check_files(checkpoint, OneWorker())
    model = load_model(config.on_host, precision)
    read_parts(checkpoint, named_tensors(model))
    return model


def named_tensors(model: Model, gradients: GradientPair | None = None, optimizer: Optimizer | None = None) -> Any:
    """Weights, persistent buffers and moments by name, each once, however they are distributed."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # a tied weight
            seen.add(id(tensor))
            named[f"model.{name}"] = tensor.detach()
    if gradients is not None and optimizer is not None:
        for name, p in zip(gradients.names, gradients.parameters, strict=True):
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    named[f"optimizer.{name}.{key}"] = value
    return named


def _without_moments(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state with None for each tensor that is written by name."""
    small = {
        index: {key: None if isinstance(value, Tensor) and value.ndim else value for key, value in of.items()}
        for index, of in state["state"].items()
    }
    return {**state, "state": small}


def _write_parts(temporary: Path, tensors: dict[str, Tensor], beside: ProcessGroup | None) -> Callable[[], object]:
    """Write this worker's part of the tensors, or copy it and write it in another thread; what waits for the end."""
    writer = dcp.FileSystemWriter(temporary / SHARDS, thread_count=1)
    with _quiet():
        if beside is None:
            dcp.save(tensors, storage_writer=writer)
            return lambda: None
        pending = dcp.async_save(tensors, storage_writer=writer, process_group=beside.group)
    assert isinstance(pending, Future), "the writer copies the tensors itself, before it returns"
    return pending.result


def _described_by_all(temporary: Path, workers: Workers) -> dict[str, Any]:
    """Size and checksum of each file of the parts, by its path; on every worker."""
    own = list((temporary / SHARDS).glob(f"__{workers.rank}_*"))
    if workers.rank == 0:
        own.append(temporary / SHARDS / ".metadata")
    return {k: v for found in workers.gather(_described(temporary, *own)) for k, v in found.items()}


def _described(folder: Path, *files: Path) -> dict[str, Any]:
    return {file.relative_to(folder).as_posix(): [file.stat().st_size, checksum(file)] for file in files}


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise StorageError(
            f"checkpoint {target} could not be written ({_cause(error)}): free space or choose another output_dir, "
            f"then resume with --resume; earlier checkpoints are untouched"
        ) from error


def _cause(error: BaseException) -> str:
    """The first worker's failure, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says about itself: that it infers a storage, or runs without a group."""
    log = logging.getLogger("torch.distributed.checkpoint")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
