"""Checkpoints: `step_NNNNNN/model` loads with `from_pretrained`, `step_NNNNNN/training_state` resumes bit for bit.

A checkpoint is written to a temporary folder and appears when it is complete; then `last` (craft_ray/storage/last.py)
points to it. The random numbers of a step are seeded by (seed, step, rank), and the sampler is a function of
(seed, step), so neither has state to save.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from craft_ray.config import ModelConfig, Precision
from craft_ray.errors import CraftError, ModelError, StorageError, first_line
from craft_ray.models import load_model
from craft_ray.models.adapting import adapter_states
from craft_ray.models.base import Model
from craft_ray.storage.files import clear_leftovers, new_folder
from craft_ray.storage.last import forget_last, point_last
from craft_ray.storage.paths import ObjectPath, StoragePath, copy_tree, remove_tree

REFUSED = "refused_"
"""Prefix of the name of a checkpoint that holds other weights than the model that was saved."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on, except the weights. Its fields are the keys of the file."""

    step: int
    """Steps done."""
    optimizer: dict[str, Any]
    reached: list[bool]
    """Which parameters have received a gradient so far."""
    constraints: list[dict[str, Any]]
    """The `state_dict` of each constraint that is enforced."""


def save_checkpoint(
    folder: Path,
    model: Model,
    state: TrainingState,
    keep: int,
    check: Callable[[Path], None] | None = None,
    spared: int | None = None,
) -> Path:
    """Write a checkpoint, point `last` at it, and remove all but the latest `keep`.

    Args:
        spared: the step of another one that stays.
        check: is called with its `model` folder before `last` points at it; what it refuses is put aside.
    """
    target = folder / checkpoint_name(state.step)
    clear_leftovers(folder)
    with new_folder(target) as temporary:
        try:
            model.save(temporary / "model", final=target / "model")
            state_file(temporary).parent.mkdir()
            torch.save(vars(state), state_file(temporary))
        except (
            RuntimeError,
            ValueError,
            OSError,
            SafetensorError,
        ) as error:  # torch and safetensors wrap the system's error
            raise StorageError(
                f"checkpoint {target} could not be written ({first_line(error)}): free space or choose "
                f"another output_dir, then resume with --resume; earlier checkpoints are untouched"
            ) from error
    if check is not None:
        try:
            check(target / "model")
        except CraftError:
            remove_tree(folder / f"{REFUSED}{target.name}")  # left by an earlier start of the same run
            target.replace(folder / f"{REFUSED}{target.name}")  # no run resumes from it
            raise
    point_last(folder, target.name)
    found = sorted(folder.glob("step_*"), key=checkpoint_step)
    until = found.index(target) + 1  # those after it are of a run that went back to an earlier step
    for old in [*found[:until][:-keep], *found[until:]]:
        if checkpoint_step(old) != spared:
            shutil.rmtree(old)
    return target


def check_saved(config: ModelConfig, precision: Precision, model: Model, folder: Path) -> None:
    """As `check_read_back`, for the folder in a checkpoint, which is put aside if it is refused."""
    kept = f"{folder.parent.parent}/{REFUSED}{folder.parent.name}"
    check_read_back(config, precision, model, folder, "trained", f"nothing resumes from it, it is kept in {kept}")


def save_model(config: ModelConfig, precision: Precision, model: Model, out: StoragePath, made: str) -> None:
    """Save a model as a plain folder, which appears once it has been read back.

    Args:
        config: that of the model that it was made from.
        made: how it was made, for errors: merged, interpolated.

    Raises:
        ModelError: the folder does not load, or holds other weights.
        StorageError: it cannot be written.
    """
    with new_folder(out, last="config.json") as temporary:
        model.save(temporary, final=out if isinstance(out, Path) else None)
        check_read_back(config, precision, model, temporary, made, f"{out} was not written")


def check_read_back(
    config: ModelConfig, precision: Precision, model: Model, folder: Path, made: str, left: str
) -> None:
    """Load a saved folder as a resumed run does, and compare its weights with those in memory, bit for bit.

    It is loaded on the host, where weights of the type that they are stored in are mapped from the file and not copied.

    Args:
        made: how the model was made, for errors.
        left: what becomes of the folder, for errors.

    Raises:
        ModelError: it does not load, or holds other weights.
    """
    trained: Mapping[str, Tensor]
    loaded: Mapping[str, Tensor]
    try:
        if model.sharded:  # no host need hold the frozen model that belongs to an adapter
            trained, loaded = adapter_states(model, folder)
        else:
            loaded = load_model(config.on_host, precision, "cpu", weights=str(folder)).module.state_dict()
            trained = model.module.state_dict()
    except CraftError as error:
        raise ModelError(f"what was saved does not load: {error.message}; {left}") from error
    different = [
        name
        for name in sorted(trained.keys() | loaded.keys())
        if name not in trained or name not in loaded or not _equal(trained[name], loaded[name])
    ]
    if different:
        raise ModelError(
            f"what was saved is not what was {made}: {len(different)} of {len(trained)} weights of a "
            f"{type(model.module).__name__} differ when its folder is loaded again (e.g. {different[0]}), so its "
            f"save_pretrained does not fit its from_pretrained: choose another model or version of transformers; "
            f"{left}"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes (a NaN equals itself)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def adopt_checkpoint(folder: StoragePath, source: Path) -> None:
    """Copy another run's checkpoint into a run's folder, so that the run resumes from it, and remove the run's own."""
    target = folder / source.name
    if isinstance(folder, ObjectPath):
        forget_last(folder)  # so that no process resumes from a half-replaced checkpoint
        copy_tree(source, target)
    else:
        with new_folder(target) as temporary:
            copy_tree(source, temporary)
    point_last(folder, source.name)
    for other in folder.glob("step_*"):
        if other.name != source.name:
            remove_tree(other)


def load_training_state(checkpoint: Path) -> TrainingState:
    """The state of a checkpoint, on the host: tensors are mapped from the file and not copied."""
    state = torch.load(state_file(checkpoint), map_location="cpu", weights_only=True, mmap=True)
    if "dual" in state:  # written by a version whose runs had one multiplier or none
        dual, cache = state.pop("dual"), state.pop("cache")
        state["constraints"] = [] if dual is None else [{"dual": dual, "cache": cache}]
    return TrainingState(**state)


def load_weights(model: Model, config: ModelConfig, precision: Precision, checkpoint: Path) -> None:
    """Give a model in training the weights of one of its run's checkpoints."""
    loaded = load_model(config.on_host, precision, "cpu", weights=str(checkpoint / "model"))
    model.module.load_state_dict(loaded.module.state_dict())


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def checkpoint_step(checkpoint: StoragePath) -> int:
    """The number of steps done at a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def state_file(checkpoint: Path) -> Path:
    return checkpoint / "training_state" / "state.pt"
