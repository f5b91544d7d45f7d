"""Checkpoints: `step_NNNNNN/model` loads with `from_pretrained`, `step_NNNNNN/training_state` resumes bit for bit.

A checkpoint is written to a temporary folder and appears when it is complete; then `last` (craft_ray/storage/last.py)
points to it. The random numbers of a step are seeded by (seed, step, rank), and the sampler is a function of
(seed, step), so neither has state to save.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from craft_ray.errors import StorageError, first_line
from craft_ray.models.base import Model
from craft_ray.storage.files import clear_leftovers, new_folder
from craft_ray.storage.last import forget_last, point_last
from craft_ray.storage.paths import ObjectPath, StoragePath, copy_tree, remove_tree


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


def save_checkpoint(folder: Path, model: Model, state: TrainingState, keep: int) -> Path:
    """Write a checkpoint, point `last` at it, and remove all but the latest `keep`."""
    target = folder / f"step_{state.step:06d}"
    clear_leftovers(folder)
    with new_folder(target) as temporary:
        try:
            model.save(temporary / "model", final=target / "model")
            _state_file(temporary).parent.mkdir()
            torch.save(vars(state), _state_file(temporary))
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
    point_last(folder, target.name)
    for old in sorted(folder.glob("step_*"), key=checkpoint_step)[:-keep]:
        shutil.rmtree(old)
    return target


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
    """The state that `save_checkpoint` wrote, on the host."""
    state = torch.load(_state_file(checkpoint), map_location="cpu", weights_only=True)
    if "dual" in state:  # written by a version whose runs had one multiplier or none
        dual, cache = state.pop("dual"), state.pop("cache")
        state["constraints"] = [] if dual is None else [{"dual": dual, "cache": cache}]
    return TrainingState(**state)


def checkpoint_step(checkpoint: StoragePath) -> int:
    """The number of steps done at a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def _state_file(checkpoint: Path) -> Path:
    return checkpoint / "training_state" / "state.pt"
