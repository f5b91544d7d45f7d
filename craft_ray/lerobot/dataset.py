"""A LeRobotDataset as a source of samples, a frame of an episode each. Its videos are decoded by LeRobot."""

from __future__ import annotations

import glob
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
from blake3 import blake3
from lerobot.datasets.io_utils import load_tasks
from lerobot.datasets.video_utils import decode_video_frames
from lerobot.utils.import_utils import get_safe_default_video_backend
from numpy.typing import NDArray

from craft_ray.config import LeRobotData
from craft_ray.data.frame import Frame
from craft_ray.data.images import decode_image, encoded_image
from craft_ray.data.place import Place
from craft_ray.data.sample import Sample
from craft_ray.errors import DataError, StorageError, first_line
from craft_ray.lerobot.frames import read_prompts, sampled
from craft_ray.lerobot.recording import (
    ACTION,
    Feature,
    Layout,
    chosen_episodes,
    column_names,
    damage_reported,
    fetch_files,
    find_dataset,
    read_columns,
    read_metadata,
)
from craft_ray.storage.files import checksum

KEYS = ("episode_index", "frame_index", "task_index", "timestamp")

TOLERANCE = 1e-4
"""Seconds by which the time of a video's picture may differ from the requested time; LeRobot's own bound."""


def open_lerobot(config: LeRobotData, key: str) -> LeRobotSource:
    """The frames of a LeRobotDataset, from a folder or the hub.

    Args:
        key: the section's path in the configuration, for error messages.

    Raises:
        ConfigError: it does not exist, is damaged or of another version, or lacks a named episode or feature.
        DataError: it holds no frames.
        StorageError: the cache of Hugging Face datasets has no space to unpack its pictures.
    """
    root, commit = find_dataset(config, key)
    with damage_reported(config, key):
        features, layout = read_metadata(root, config, key)
    chosen = chosen_episodes(len(layout.episodes), config, key)
    if commit is not None:
        root = fetch_files(config, key, [*layout.data(chosen), *layout.videos(chosen)], commit)
    with damage_reported(config, key):
        return LeRobotSource(config, root, features, layout, chosen)


def action_chunk(actions: NDArray[np.float32], size: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The next `size` actions, padded as in LeRobot: after the end of the episode, its last action repeats.

    Args:
        actions: [T, D], from a frame to the end of its episode.

    Returns:
        [size, D], and [size], which of them are such repetitions.
    """
    steps = np.arange(size)
    return actions[np.minimum(steps, len(actions) - 1)], steps >= len(actions)


class LeRobotSource:
    """The frames of the chosen episodes. Numbers are kept in memory; pictures are decoded when their row is read."""

    def __init__(
        self, config: LeRobotData, root: Path, features: Sequence[Feature], layout: Layout, chosen: Sequence[int]
    ) -> None:
        self.name = config.path
        self.features: dict[str, tuple[int, ...]] = {f.name: f.shape for f in features}
        self.has_responses = ACTION in self.features
        self.has_choices = False
        self.has_conversations = self.has_image_lists = False
        self._config, self._root, self._layout, self._chosen = config, root, layout, chosen
        data = layout.data(chosen)
        for file in (*data, *layout.videos(chosen)):
            if not (root / file).is_file():
                raise FileNotFoundError(f"{file} is missing")
        paths = [root / file for file in data]
        self._videos = [f for f in features if f.dtype == "video"]
        self._images = [f for f in features if f.dtype == "image"]
        for path in paths:
            if lacks := {f.stored for f in features if f not in self._videos} - set(column_names(path)):
                raise ValueError(f"{path} lacks {', '.join(sorted(lacks))}")
        self._contents = {file: checksum(root / file) for file in data}
        self._tasks = [str(task) for task in load_tasks(root).index]
        vectors = [f for f in features if f.dtype not in ("image", "video")]
        columns = read_columns(paths, {f.stored: f.shape for f in vectors} | dict.fromkeys(KEYS, ()))
        self._vectors = {f.name: columns[f.stored].astype(np.float32, copy=False) for f in vectors}
        for array in self._vectors.values():
            array.flags.writeable = False  # samples are views of it
        self._actions = self._vectors.pop(ACTION, None)
        self._episode, self._frame, self._task, self._time = (columns[name] for name in KEYS)
        if self._task.min() < 0 or self._task.max() >= len(self._tasks):
            raise ValueError(
                f"a frame has task {self._task.max()}, but meta/tasks.parquet has {len(self._tasks)} tasks"
            )
        self._ends, rows = self._spans()
        self._rows = sampled(np.concatenate(rows)[: config.limit], config)
        self._prompts = None if config.prompts is None else read_prompts(config.prompts)
        self._pictures = self._picture_table(paths) if self._images else None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the chosen episodes' files, independent of their location, and of what is selected from them."""
        meta = [file.relative_to(self._root).as_posix() for file in (self._root / "meta").rglob("*") if file.is_file()]
        digest = blake3()
        for file in (*sorted(meta), *self._contents, *self._layout.videos(self._chosen)):
            content = self._contents.get(file) or checksum(self._root / file)
            digest.update(f"{file} {content}\n".encode())
        episodes = None if self._config.episodes is None else sorted(self._config.episodes)
        how = {"episodes": episodes, **self._config.model_dump(include={"stride", "limit", "rename"})}
        if self._config.sample is not None:
            how |= self._config.model_dump(include={"sample", "sample_seed"})
        if self._prompts is not None:
            how |= {"prompts": self._prompts, "sample_seed": self._config.sample_seed}
        digest.update(json.dumps(how, sort_keys=True).encode())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        at = int(self._rows[row])
        episode = int(self._episode[at])
        name = self._id(at)
        end = self._ends[episode]
        frame = Frame(
            images=self._decode(at, episode, name),
            state={name: array[at] for name, array in self._vectors.items()},
            actions=None if self._actions is None else self._actions[at:end],
        )
        return Sample(id=name, prompt=self._prompt(at, name), frame=frame, origin=str(self.place(row)))

    def _prompt(self, at: int, name: str) -> str:
        """The words of the frame's task, or one of the prompts, chosen by the frame's id."""
        if self._prompts is None:
            return self._tasks[self._task[at]]
        return random.Random(f"{self._config.sample_seed} {name}").choice(self._prompts)

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def place(self, row: int) -> Place:
        return Place(self.name, self._id(int(self._rows[row])))

    def ids(self) -> list[str]:
        return [self._id(at) for at in self._rows]

    def _id(self, at: int) -> str:
        return f"episode_{self._episode[at]:06d}-frame_{self._frame[at]:06d}"

    def _spans(self) -> tuple[dict[int, int], list[NDArray[np.int64]]]:
        """For each episode, the end of its rows (exclusive); for each chosen episode, the rows to read."""
        starts = np.flatnonzero(np.diff(self._episode, prepend=-1))
        ends = [*starts[1:], len(self._episode)]
        spans = {int(self._episode[start]): (int(start), int(end)) for start, end in zip(starts, ends, strict=True)}
        rows = []
        for episode in self._chosen:
            start, end = spans.get(episode, (0, 0))
            length = self._layout.episodes[episode]["length"]
            if end - start != length or (self._frame[start:end] != np.arange(length)).any():
                raise ValueError(f"the {length} frames of episode {episode} are not consecutive in its data")
            rows.append(np.arange(start, end, self._config.stride))
        return {episode: end for episode, (_, end) in spans.items()}, rows

    def _picture_table(self, paths: Sequence[Path]) -> datasets.Dataset:
        """The encoded pictures of all rows, memory-mapped."""
        content = blake3("".join(self._contents.values()).encode()).hexdigest()[:32]
        # The library identifies a file by path and time; the content hash in the folder's name separates old copies.
        cache = os.path.join(datasets.config.HF_DATASETS_CACHE, "craft-ray", content)
        names, files = [f.stored for f in self._images], [glob.escape(str(path)) for path in paths]
        try:
            table = datasets.load_dataset("parquet", data_files=files, columns=names, split="train", cache_dir=cache)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno is not None:  # not from the tables, which were just read
                raise StorageError(
                    f"the pictures of {self.name} could not be unpacked into {cache} ({cause.strerror}): free space, "
                    f"or set HF_DATASETS_CACHE to another folder"
                ) from None
            raise
        for name in names:
            table = table.cast_column(name, datasets.Image(decode=False))
        return table

    def _decode(self, at: int, episode: int, sample: str) -> dict[str, NDArray[np.uint8]]:
        pictures = {}
        where = f"{self.name}, {sample}"
        cells = {} if self._pictures is None else self._pictures[at]
        for feature in self._images:
            encoded = encoded_image(cells[feature.stored], self._root, where)
            pictures[feature.name] = np.asarray(decode_image(encoded, where))
        for feature in self._videos:
            file, start = self._layout.video(episode, feature.stored)
            pictures[feature.name] = _video_picture(self._root / file, start + float(self._time[at]), where)
        for feature in chain(self._images, self._videos):
            height, width, _ = pictures[feature.name].shape
            if (height, width) != feature.shape[1:]:
                raise DataError(
                    f"{where}: {feature.stored} is {height} x {width} pixels, but meta/info.json says "
                    f"{' x '.join(map(str, feature.shape[1:]))}: fix the data set"
                )
        return pictures


def _video_picture(path: Path, second: float, where: str) -> NDArray[np.uint8]:
    """The picture [H, W, 3] of a video at the given second."""
    try:
        frames = decode_video_frames(path, [second], TOLERANCE, _video_backend(), return_uint8=True)
    except Exception as error:  # each decoder raises its own errors
        raise DataError(
            f"{where}: {path} does not decode at {second:.3f} s ({first_line(error)}): fetch or record it again"
        ) from None
    return np.ascontiguousarray(frames[0].permute(1, 2, 0).numpy())


@cache
def _video_backend() -> str:
    """The backend with which LeRobot decodes videos. If torchcodec does not load, it logs a page and picks another."""
    logger = logging.getLogger(get_safe_default_video_backend.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        backend: str = get_safe_default_video_backend()
    finally:
        logger.setLevel(level)
    return backend
