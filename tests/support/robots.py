"""Small LeRobot policies and data sets that several tests load, train and damage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets import LeRobotDataset
from numpy.typing import NDArray

from craft_ray.examples.robot import write_policy
from craft_ray.lerobot.size import PaliGemmaSize

TASKS = ("close the drawer", "open the drawer")


def small_size(width: int = 32, depth: int = 2) -> PaliGemmaSize:
    return PaliGemmaSize(
        width=width,
        depth=depth,
        mlp=2 * width,
        heads=2,
        kv_heads=1,
        head_dim=width // 2,
        vision_width=width,
        vision_depth=1,
        vision_mlp=2 * width,
        vision_heads=2,
        patch=8,
        image=32,
        vocabulary=1280,
    )


def smooth_chunks(count: int = 64, length: int = 8, dimensions: int = 4, seed: int = 0) -> NDArray[np.float32]:
    """[N, T, D] actions in [-1, 1] that change little from one step to the next, as a robot's do."""
    steps = np.random.default_rng(seed).normal(size=(count, length, dimensions)) * 0.2
    return np.tanh(np.cumsum(steps, axis=1)).astype(np.float32)


def small_policy(
    folder: Path,
    *,
    cameras: int | Sequence[str] = 1,
    tasks: Sequence[str] = TASKS,
    empty_cameras: int = 0,
    states: int = 4,
    actions: int = 4,
    chunk: int = 8,
    width: int = 32,
    depth: int = 2,
    seed: int = 0,
) -> Path:
    """A pi0_fast policy of 0.1 million parameters that sees pictures of 32 pixels `observation.images.{camera}`.

    Args:
        cameras: their names, or how many: `camera0`, ...
        tasks: the tasks that its prompts have room for.
    """
    names = [f"camera{i}" for i in range(cameras)] if isinstance(cameras, int) else cameras
    pictures = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for name in names}
    features = {
        **pictures,
        "observation.state": PolicyFeature(FeatureType.STATE, (states,)),
        "action": PolicyFeature(FeatureType.ACTION, (actions,)),
    }
    ranges = {
        name: {"min": [-1.0] * count, "max": [1.0] * count}
        for name, count in (("observation.state", states), ("action", actions))
    }
    folder.mkdir(parents=True, exist_ok=True)
    chunks = smooth_chunks(64, chunk, actions)
    size = small_size(width, depth)
    write_policy(
        folder, size, features, chunks, tasks, ranges, action_tokens=512, empty_cameras=empty_cameras, seed=seed
    )
    return folder


def write_dataset(
    root: Path,
    episodes: int = 3,
    frames: int | Sequence[int] = 6,
    size: int | tuple[int, int] = 32,
    cameras: Sequence[str] = ("top",),
    state: int = 4,
    action: int = 4,
    *,
    videos: bool = False,
    task: str | Sequence[str] = "push",
    fps: int = 10,
    file_mb: int | None = None,
    seed: int = 0,
) -> Path:
    """A LeRobotDataset with `observation.images.{camera}`, `observation.state` and `action`, all from the seed.

    Args:
        root: a folder that does not exist yet.
        frames: frames per episode; several numbers are used in turn.
        size: a picture's side, or height and width.
        task: the task of an episode; several are used in turn.
        file_mb: size above which another file is started.
    """
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": (state,), "names": [f"joint{i}" for i in range(state)]},
        "action": {"dtype": "float32", "shape": (action,), "names": [f"joint{i}" for i in range(action)]},
    }
    pictures = [f"observation.images.{camera}" for camera in cameras]
    pixels = (size, size, 3) if isinstance(size, int) else (*size, 3)
    for name in pictures:
        form = {"shape": pixels, "names": ["height", "width", "channels"]}
        features[name] = {"dtype": "video" if videos else "image", **form}
    dataset = LeRobotDataset.create(
        root.name, fps, features, root=root, use_videos=videos, data_files_size_in_mb=file_mb
    )
    random = np.random.default_rng(seed)
    lengths = [frames] if isinstance(frames, int) else list(frames)
    tasks = [task] if isinstance(task, str) else list(task)
    for episode in range(episodes):
        length = lengths[episode % len(lengths)]
        steps = random.normal(size=(length + 1, max(state, action))) * 0.2
        path = np.tanh(np.cumsum(steps, axis=0)).astype(np.float32)
        scenes = {name: random.integers(0, 256, pixels, dtype=np.uint8) for name in pictures}
        for frame in range(length):
            dataset.add_frame(
                {
                    **{name: np.roll(scene, frame, axis=1) for name, scene in scenes.items()},
                    "observation.state": path[frame, :state],
                    "action": path[frame + 1, :action],
                    "task": tasks[episode % len(tasks)],
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root
