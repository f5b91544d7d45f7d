"""A LeRobotDataset as a source of samples, a frame of an episode each.

Its tables are read here: LeRobot's own reader keeps a copy by path and time, and serves the old one when a data set was
rewritten in place. Its videos are decoded by LeRobot.
"""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from blake3 import blake3
from huggingface_hub import is_offline_mode, snapshot_download
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
from lerobot.datasets.io_utils import load_tasks
from lerobot.datasets.video_utils import decode_video_frames
from lerobot.utils.constants import DEFAULT_FEATURES, HF_LEROBOT_HOME, HF_LEROBOT_HUB_CACHE
from lerobot.utils.import_utils import get_safe_default_video_backend
from numpy.typing import NDArray
from packaging.version import Version

from craft_ray.config import LeRobotData
from craft_ray.data.formats import LEROBOT_MARK
from craft_ray.data.frame import Frame
from craft_ray.data.images import decode_image, encoded_image
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError, StorageError, first_line
from craft_ray.storage.files import checksum

ACTION = "action"
OBSERVATION = "observation."
KEYS = ("episode_index", "frame_index", "task_index", "timestamp")
NUMBERS = ("float", "int", "uint", "bool")
"""How the types begin of which a vector can be made; there are texts, too."""

TOLERANCE = 1e-4
"""Seconds that a video's picture may lie beside the moment that is asked for; LeRobot's own bound."""

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"


def open_lerobot(config: LeRobotData, key: str) -> LeRobotSource:
    """The frames of a LeRobotDataset, from a folder or the hub.

    Args:
        key: the section's place in the configuration, for errors.

    Raises:
        ConfigError: nothing is there, it is damaged or of another version, or a named episode or feature is missing.
        DataError: it holds no frame.
        StorageError: there is no room to unpack its pictures in the cache of Hugging Face datasets.
    """
    root, commit = _root(config, key)
    with _damage(config, key):
        info = json.loads((root / LEROBOT_MARK).read_text(encoding="utf-8"))
        _check_version(info["codebase_version"], config, key)
        features = _features(info["features"], config, key)
        if not info["total_frames"]:
            raise DataError(f"{key}: {config.path} holds no frame; name a data set with at least one episode")
        layout = _layout(root, info, features)
    chosen = _chosen(len(layout.episodes), config, key)
    if commit is not None:
        root = _fetch(config, key, [*layout.data(chosen), *layout.videos(chosen)], commit)
    with _damage(config, key):
        return LeRobotSource(config, root, features, layout, chosen)


def action_chunk(actions: NDArray[np.float32], size: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The next `size` actions, as LeRobot gives them: after the end of the episode its last one repeats.

    Args:
        actions: [T, D], from a moment to the end of its episode.

    Returns:
        [size, D], and [size] which of them are such repetitions.
    """
    steps = np.arange(size)
    return actions[np.minimum(steps, len(actions) - 1)], steps >= len(actions)


@dataclass(frozen=True)
class Feature:
    """A column that a sample takes something from."""

    stored: str
    """Its name in the data set."""
    name: str
    """Its name to the policy."""
    dtype: str
    shape: tuple[int, ...]
    """Of pictures: channels, height, width."""


@dataclass(frozen=True)
class Layout:
    """Which file of a data set each episode lies in."""

    episodes: Sequence[Mapping[str, Any]]
    data_path: str
    video_path: str | None
    cameras: tuple[str, ...]
    """Names in the data set of the features that are videos."""

    def data(self, chosen: Sequence[int]) -> list[str]:
        """The tables of some episodes, in the order of their rows."""
        spots = {(self.episodes[e]["data/chunk_index"], self.episodes[e]["data/file_index"]) for e in chosen}
        return [self.data_path.format(chunk_index=chunk, file_index=file) for chunk, file in sorted(spots)]

    def video(self, episode: int, camera: str) -> tuple[str, float]:
        """The file with an episode's pictures, and the second of it at which the episode begins."""
        assert self.video_path is not None
        row = self.episodes[episode]
        chunk, file = row[f"videos/{camera}/chunk_index"], row[f"videos/{camera}/file_index"]
        path = self.video_path.format(video_key=camera, chunk_index=chunk, file_index=file)
        return path, row[f"videos/{camera}/from_timestamp"]

    def videos(self, chosen: Sequence[int]) -> list[str]:
        return sorted({self.video(episode, camera)[0] for episode in chosen for camera in self.cameras})


class LeRobotSource:
    """The frames of the chosen episodes. Numbers are kept in memory; the pictures of a row are decoded when it is asked
    for."""

    def __init__(
        self, config: LeRobotData, root: Path, features: Sequence[Feature], layout: Layout, chosen: Sequence[int]
    ) -> None:
        self.name = config.path
        self.features: dict[str, tuple[int, ...]] = {f.name: f.shape for f in features}
        self.has_responses = ACTION in self.features
        self.has_choices = False
        self._config, self._root, self._layout, self._chosen = config, root, layout, chosen
        data = layout.data(chosen)
        for file in (*data, *layout.videos(chosen)):
            if not (root / file).is_file():
                raise FileNotFoundError(f"{file} is missing")
        paths = [root / file for file in data]
        self._videos = [f for f in features if f.dtype == "video"]
        self._images = [f for f in features if f.dtype == "image"]
        for path in paths:
            if lacks := {f.stored for f in features if f not in self._videos} - set(_column_names(path)):
                raise ValueError(f"{path} lacks {', '.join(sorted(lacks))}")
        self._contents = {file: checksum(root / file) for file in data}
        self._tasks = [str(task) for task in load_tasks(root).index]
        vectors = [f for f in features if f.dtype not in ("image", "video")]
        columns = _read(paths, {f.stored: f.shape for f in vectors} | dict.fromkeys(KEYS, ()))
        self._vectors = {f.name: columns[f.stored].astype(np.float32, copy=False) for f in vectors}
        for array in self._vectors.values():
            array.flags.writeable = False  # samples are views of it
        self._actions = self._vectors.pop(ACTION, None)
        self._episode, self._frame, self._task, self._time = (columns[name] for name in KEYS)
        if self._task.min() < 0 or self._task.max() >= len(self._tasks):
            raise ValueError(f"a frame is of task {self._task.max()}, meta/tasks.parquet has {len(self._tasks)} tasks")
        self._ends, rows = self._spans()
        self._rows = np.concatenate(rows)[: config.limit]
        self._pictures = self._picture_table(paths) if self._images else None

    @cached_property
    def fingerprint(self) -> str:
        """Of the files behind the chosen episodes, wherever they lie, and of what is taken from them."""
        meta = [file.relative_to(self._root).as_posix() for file in (self._root / "meta").rglob("*") if file.is_file()]
        digest = blake3()
        for file in (*sorted(meta), *self._contents, *self._layout.videos(self._chosen)):
            content = self._contents.get(file) or checksum(self._root / file)
            digest.update(f"{file} {content}\n".encode())
        episodes = None if self._config.episodes is None else sorted(self._config.episodes)
        how = {"episodes": episodes, **self._config.model_dump(include={"stride", "limit", "rename"})}
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
        return Sample(id=name, prompt=self._tasks[self._task[at]], frame=frame)

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def ids(self) -> list[str]:
        return [self._id(at) for at in self._rows]

    def _id(self, at: int) -> str:
        return f"episode_{self._episode[at]:06d}-frame_{self._frame[at]:06d}"

    def _spans(self) -> tuple[dict[int, int], list[NDArray[np.int64]]]:
        """The row after the last of each episode, and the rows to take of each."""
        starts = np.flatnonzero(np.diff(self._episode, prepend=-1))
        ends = [*starts[1:], len(self._episode)]
        spans = {int(self._episode[start]): (int(start), int(end)) for start, end in zip(starts, ends, strict=True)}
        rows = []
        for episode in self._chosen:
            start, end = spans.get(episode, (0, 0))
            length = self._layout.episodes[episode]["length"]
            if end - start != length or (self._frame[start:end] != np.arange(length)).any():
                raise ValueError(f"the {length} frames of episode {episode} do not stand in its data in a row")
            rows.append(np.arange(start, end, self._config.stride))
        return {episode: end for episode, (_, end) in spans.items()}, rows

    def _picture_table(self, paths: Sequence[Path]) -> datasets.Dataset:
        """The encoded pictures of all rows, memory-mapped."""
        content = blake3("".join(self._contents.values()).encode()).hexdigest()[:32]
        # The library knows a file by its path and time; the content in the folder's name keeps old copies apart.
        cache = os.path.join(datasets.config.HF_DATASETS_CACHE, "craft-ray", content)
        names, files = [f.stored for f in self._images], [glob.escape(str(path)) for path in paths]
        try:
            table = datasets.load_dataset("parquet", data_files=files, columns=names, split="train", cache_dir=cache)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno is not None:  # not of the tables, which were read just now
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
                    f"{where}: {feature.stored} is {height} x {width} pixels, meta/info.json says "
                    f"{' x '.join(map(str, feature.shape[1:]))}: mend the data set"
                )
        return pictures


# -- where it is and what it says of itself


def _root(config: LeRobotData, key: str) -> tuple[Path, str | None]:
    """The folder of a data set; of one on the hub, its commit too, and for now no more than its meta folder."""
    path = Path(config.path)
    if path.is_dir() or config.path.startswith(("/", ".", "~")):
        if not (path / LEROBOT_MARK).is_file():
            raise ConfigError(
                f"{key}: there is no LeRobotDataset at {path}, which would have {LEROBOT_MARK}: name its folder, or a "
                f"data set on the hub"
            )
        return path, None
    recorded = HF_LEROBOT_HOME / path
    if config.revision is None and (recorded / LEROBOT_MARK).is_file():
        return recorded, None
    snapshot = _fetch(config, key, ["meta/**"], config.revision or CODEBASE_VERSION)
    return snapshot, snapshot.name


def _fetch(config: LeRobotData, key: str, files: list[str], revision: str) -> Path:
    """A hub data set's folder in the cache that LeRobot has, with these files. Offline it is what is there already."""
    try:
        return Path(
            snapshot_download(
                config.path,
                repo_type="dataset",
                revision=revision,
                cache_dir=HF_LEROBOT_HUB_CACHE,
                allow_patterns=files,
                local_files_only=is_offline_mode(),  # else it asks for the list of a commit's files
            )
        )
    except Exception as error:  # the hub's client raises anything
        raise ConfigError(
            f"{key}: there is no folder {config.path}, and no LeRobotDataset of that name with revision {revision} on "
            f"the hub or in its local cache ({first_line(error)}): name a folder, or fetch it while online"
        ) from None


@contextmanager
def _damage(config: LeRobotData, key: str) -> Iterator[None]:
    """Whatever a damaged file makes fail, in one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = f"{cause} is missing" if isinstance(cause, KeyError) else first_line(cause)
        raise ConfigError(
            f"{key}: the LeRobotDataset {config.path} is damaged or incomplete ({reason}): fetch it again, or record "
            f"it to the end (finalize)"
        ) from None


def _check_version(found: str, config: LeRobotData, key: str) -> None:
    theirs, ours = Version(found).major, Version(CODEBASE_VERSION).major
    if theirs != ours:
        convert = f"convert it with {CONVERTER} (which pushes it to the hub by default)"
        remedy = convert if theirs < ours else "install a LeRobot that reads it"
        raise ConfigError(
            f"{key}: {config.path} is a LeRobotDataset of version {found}, but LeRobot {version('lerobot')} reads "
            f"{CODEBASE_VERSION}: {remedy}"
        )


def _features(stored: Mapping[str, Mapping[str, Any]], config: LeRobotData, key: str) -> list[Feature]:
    """What of a data set goes into a sample: pictures, observations and the action."""
    present = [name for name in stored if name not in DEFAULT_FEATURES]
    for name in config.rename:
        if name not in present:
            raise ConfigError(
                f"{key}.rename names '{name}', but {config.path} has the features {', '.join(present)}: rename those"
            )
    features: dict[str, Feature] = {}
    for name in present:
        dtype, shape, ours = stored[name]["dtype"], tuple(stored[name]["shape"]), config.rename.get(name, name)
        if dtype in ("image", "video"):
            shape = _picture_shape(name, stored[name], config, key)
        elif not dtype.startswith(NUMBERS) or not (ours == ACTION or ours.startswith(OBSERVATION)):
            continue
        if ours in features:
            raise ConfigError(
                f"{key}.rename: {features[ours].stored} and {name} of {config.path} would both be {ours}: give each a "
                f"name of its own"
            )
        features[ours] = Feature(name, ours, dtype, shape)
    for name, ours in config.rename.items():
        if ours not in features:
            raise ConfigError(
                f"{key}.rename makes {name} of {config.path} {ours}, which a sample has no place for: it holds "
                f"pictures, numbers that begin with {OBSERVATION}, and {ACTION}"
            )
    return list(features.values())


def _picture_shape(name: str, stored: Mapping[str, Any], config: LeRobotData, key: str) -> tuple[int, int, int]:
    """Channels, height, width."""
    *two, last = stored["shape"]
    shape = (last, *two) if stored["names"][2] in ("channel", "channels") else (*two, last)
    details = (stored.get("info") or {}) | (stored.get("video_info") or {})
    depth = any(details.get(mark) for mark in ("is_depth_map", "video.is_depth_map"))
    if depth or len(shape) != 3 or shape[0] != 3:
        what = "a depth map" if depth else f"of shape {list(stored['shape'])}"
        raise ConfigError(
            f"{key}: {name} of {config.path} is {what}, and only pictures of three colours are supported: take it "
            f"out of the data set"
        )
    return shape


def _layout(root: Path, info: Mapping[str, Any], features: Sequence[Feature]) -> Layout:
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    rows: list[dict[str, Any]] = []
    for file in files:
        names = [name for name in _column_names(file) if not name.startswith("stats/")]
        rows += _table(file, names).to_pylist()
    rows.sort(key=lambda row: row["episode_index"])
    if [row["episode_index"] for row in rows] != list(range(info["total_episodes"])):
        raise ValueError(f"meta/info.json counts {info['total_episodes']} episodes, meta/episodes names {len(rows)}")
    cameras = tuple(feature.stored for feature in features if feature.dtype == "video")
    return Layout(rows, info["data_path"], info["video_path"] if cameras else None, cameras)


def _chosen(count: int, config: LeRobotData, key: str) -> list[int]:
    """The episodes to read, in their order in the data set."""
    if config.episodes is None:
        return list(range(count))
    for episode in config.episodes:
        if episode >= count:
            raise ConfigError(
                f"{key}.episodes names {episode}, but {config.path} has {count} episodes, 0 to {count - 1}: name those"
            )
    return sorted(config.episodes)


# -- what is in its files


def _read(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """Columns of numbers, [N, *shape] each, over all files."""
    tables = [_table(file, list(shapes)) for file in files]
    return {
        name: np.concatenate([_numbers(name, table[name], shape) for table in tables]) for name, shape in shapes.items()
    }


def _column_names(file: Path) -> list[str]:
    try:
        return list(pq.read_schema(file).names)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {first_line(error)}") from None


def _table(file: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(file, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {first_line(error)}") from None


def _numbers(name: str, column: pa.ChunkedArray, shape: tuple[int, ...]) -> NDArray[Any]:
    """A column as [N, *shape]; a single number may stand without a list around it."""
    parts = []
    for chunk in column.chunks:
        values = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        for size in shape:
            if not pa.types.is_nested(values.type):
                break
            if values.null_count or set(pc.unique(pc.list_value_length(values)).to_pylist()) - {size}:
                raise ValueError(f"{name} is not of shape {list(shape)} everywhere")
            values = values.flatten()
        array = values.to_numpy(zero_copy_only=False)
        if values.null_count or array.size != len(chunk) * int(np.prod(shape)):
            raise ValueError(f"{name} is not of shape {list(shape)} everywhere")
        parts.append(array.reshape(len(chunk), *shape))
    return np.concatenate(parts)


def _video_picture(path: Path, second: float, where: str) -> NDArray[np.uint8]:
    """[H, W, 3] of a video at a time."""
    try:
        frames = decode_video_frames(path, [second], TOLERANCE, _decoder(), return_uint8=True)
    except Exception as error:  # each decoder has errors of its own
        raise DataError(
            f"{where}: {path} does not decode at {second:.3f} s ({first_line(error)}): fetch or record it again"
        ) from None
    return np.ascontiguousarray(frames[0].permute(1, 2, 0).numpy())


@cache
def _decoder() -> str:
    """What LeRobot decodes videos with here. It logs a page where torchcodec does not load, and goes on without."""
    logger = logging.getLogger(get_safe_default_video_backend.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        backend: str = get_safe_default_video_backend()
    finally:
        logger.setLevel(level)
    return backend
