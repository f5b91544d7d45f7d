"""What a checkpoint of LeRobot's loop holds for CRaFT, in addition to LeRobot's own state: `training_state/craft.pt`.

The file is written last and appears complete or not at all, and an older one is removed first: if it is there, the
rest of the checkpoint is complete and of the same step.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.constants import TRAINING_STATE_DIR

from craft_ray.errors import ConfigError, StorageError, first_line
from craft_ray.storage.files import new_file


@dataclass(frozen=True)
class CraftState:
    """What the next step depends on beyond what LeRobot saves. Its fields are the keys of the file."""

    accumulated: int
    """Batches of LeRobot's loop that make one step of CRaFT."""
    constraints: list[dict[str, Any]]
    """`Constraints.state_dicts`: the multipliers, and which cache they belong to."""
    reached: list[bool]
    """Which parameters have had a gradient so far."""


def state_file(checkpoint: Path) -> Path:
    return checkpoint / TRAINING_STATE_DIR / "craft.pt"


def forget_state(checkpoint: Path) -> None:
    """A checkpoint that is about to be overwritten is no longer complete."""
    state_file(checkpoint).unlink(missing_ok=True)


def save_state(checkpoint: Path, state: CraftState) -> None:
    """
    Raises:
        StorageError: the disk is full; the checkpoint stays without the file.
    """
    file = state_file(checkpoint)
    with new_file(file) as temporary:
        try:
            torch.save(vars(state), temporary)
        except RuntimeError as error:  # torch wraps the system's error
            raise StorageError(
                f"{file} could not be written ({first_line(error)}): free space, then resume from an earlier checkpoint"
            ) from error


def load_state(checkpoint: Path, accumulated: int) -> CraftState:
    """What `save_state` wrote, on the host.

    Args:
        accumulated: batches of the loop that make a step of the run that resumes.

    Raises:
        ConfigError: the checkpoint was saved without CRaFT, not completely, or by a run with other steps.
        StorageError: the file is damaged.
    """
    file = state_file(checkpoint)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if "constraint" in content:  # written when there was always one
            content["constraints"] = [content.pop("constraint")]
        state = CraftState(**content)
    except FileNotFoundError:
        raise ConfigError(
            f"the checkpoint {checkpoint} has no {file.relative_to(checkpoint)}: it was saved without craft_updates, "
            f"or not completely; resume from one that has it, or resume without craft_updates"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, OSError) as error:
        raise StorageError(f"{file} is damaged ({first_line(error)}): resume from an earlier checkpoint") from None
    if state.accumulated != accumulated:
        raise ConfigError(
            f"the run of the checkpoint {checkpoint} accumulates gradients over {state.accumulated} batch(es), this "
            f"one over {accumulated}: resume with gradient_accumulation_steps={state.accumulated}"
        )
    return state
