"""Demonstrations of Meta-World's scripted experts as LeRobotDatasets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from craft_ray.errors import DataError
from craft_ray.lerobot.metaworld import ACTIONS, CONTROL_HZ, PICTURE, STATE, STATES, MetaworldSimulation, check_task
from craft_ray.quiet import without_prints
from craft_ray.storage.files import new_folder

AFTER = 2
"""Actions that are recorded after the task is done, so that a policy learns to hold the position."""


def write_demonstrations(
    root: Path,
    task: str,
    episodes: int,
    size: int,
    *,
    action_repeat: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    recorded: Callable[[], object] = lambda: None,
) -> None:
    """Record successful episodes of the task's expert, with pictures. The data set appears once it is complete.

    Args:
        size: side of the pictures, in pixels.
        noise: standard deviation of what disturbs the arm; the expert's undisturbed actions are recorded, so they
            also show how to recover.
        seed: seed of the first attempt's initial condition, and of the noise.
        recorded: called after each episode that is kept.

    Raises:
        ConfigError: there is no such task.
        DataError: the expert fails too often.
    """
    check_task(task, "demonstrations")
    hz = max(1, round(CONTROL_HZ / action_repeat))
    features = {
        PICTURE: {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channels"]},
        STATE: {"dtype": "float32", "shape": (STATES,), "names": ["x", "y", "z", "gripper"]},
        "action": {"dtype": "float32", "shape": (ACTIONS,), "names": ["dx", "dy", "dz", "gripper"]},
    }
    simulation = MetaworldSimulation(task, size, size, action_repeat)
    rng = np.random.default_rng(seed)
    with new_folder(root) as temporary, contextlib.closing(simulation), _silent():
        temporary.rmdir()  # LeRobot creates it
        kept = {"robot_type": "sawyer", "use_videos": False, "video_backend": "pyav"}  # the search for one logs a page
        data = LeRobotDataset.create(root.name, hz, features, temporary, **kept)
        done = 0
        try:
            for attempt in range(2 * episodes + 5):
                frames = _attempt(simulation, seed + attempt, noise, rng)
                if frames is None:
                    continue
                for frame in frames:
                    data.add_frame(frame)
                data.save_episode()
                recorded()
                done += 1
                if done == episodes:
                    break
        finally:
            data.finalize()  # otherwise it writes on garbage collection, into a folder that is gone
        for file in sorted(temporary.glob("data/**/*.parquet")):
            _drop_fingerprint(file)
        if done < episodes:
            raise DataError(f"the expert of {task} succeeds in only {done} of {attempt + 1} attempts: lower the noise")


def _attempt(
    simulation: MetaworldSimulation, seed: int, noise: float, rng: np.random.Generator
) -> list[dict[str, object]] | None:
    """The frames of an episode, or None if the expert fails."""
    simulation.reset(seed)
    frames: list[dict[str, object]] = []
    left = None
    for _ in range(simulation.max_decisions):
        seen = simulation.observe()
        action = simulation.expert()
        frames.append({**seen.images, **seen.state, "action": action, "task": simulation.description})
        disturbed = action.copy()
        disturbed[:3] += rng.normal(size=3) * noise  # the last number opens and closes the gripper: no noise
        if simulation.step(disturbed) and left is None:
            left = AFTER
        if left is not None:
            if not left:
                return frames
            left -= 1
    return None


def _drop_fingerprint(path: Path) -> None:
    """Make equal demonstrations equal files: datasets stores in them a hash of the path that it wrote to."""
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
        notes = json.loads(file.schema_arrow.metadata[b"huggingface"])
        schema = file.schema_arrow.with_metadata({"huggingface": json.dumps({"info": notes["info"]})})
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(group.cast(schema))


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress what LeRobot prints, and the progress bar that datasets draws for each episode."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with without_prints():
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
