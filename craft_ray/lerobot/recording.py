"""The recorded files of a LeRobotDataset: where they are, what its metadata says, and its tables of numbers.

LeRobot's own reader caches a table by path and time and returns the old copy after a data set was rewritten in place,
so the tables are read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import is_offline_mode, snapshot_download
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
from lerobot.utils.constants import DEFAULT_FEATURES, HF_LEROBOT_HOME, HF_LEROBOT_HUB_CACHE
from numpy.typing import NDArray
from packaging.version import Version

from craft_ray.config import LeRobotData
from craft_ray.data.formats import LEROBOT_MARK
from craft_ray.errors import ConfigError, DataError, first_line

ACTION = "action"
OBSERVATION = "observation."
NUMBERS = ("float", "int", "uint", "bool")
"""Prefixes of the types that can become a vector; other types, such as strings, cannot."""

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"


@dataclass(frozen=True)
class Feature:
    """A column that becomes part of a sample."""

    stored: str
    """Its name in the data set."""
    name: str
    """Its name in samples, as the policy knows it."""
    dtype: str
    shape: tuple[int, ...]
    """For pictures: channels, height, width."""


@dataclass(frozen=True)
class Layout:
    """Which files of a data set hold each episode."""

    episodes: Sequence[Mapping[str, Any]]
    data_path: str
    video_path: str | None
    cameras: tuple[str, ...]
    """The features that are videos, by their names in the data set."""

    def data(self, chosen: Sequence[int]) -> list[str]:
        """The tables of the chosen episodes, in the order of their rows."""
        spots = {(self.episodes[e]["data/chunk_index"], self.episodes[e]["data/file_index"]) for e in chosen}
        return [self.data_path.format(chunk_index=chunk, file_index=file) for chunk, file in sorted(spots)]

    def video(self, episode: int, camera: str) -> tuple[str, float]:
        """The video file of an episode, and the second at which the episode starts in it."""
        assert self.video_path is not None
        row = self.episodes[episode]
        chunk, file = row[f"videos/{camera}/chunk_index"], row[f"videos/{camera}/file_index"]
        path = self.video_path.format(video_key=camera, chunk_index=chunk, file_index=file)
        return path, row[f"videos/{camera}/from_timestamp"]

    def videos(self, chosen: Sequence[int]) -> list[str]:
        return sorted({self.video(episode, camera)[0] for episode in chosen for camera in self.cameras})


# -- location and metadata


def find_dataset(config: LeRobotData, key: str) -> tuple[Path, str | None]:
    """The folder of a data set and, if it is on the hub, its commit; then only its meta folder is downloaded yet."""
    path = Path(config.path)
    if path.is_dir() or config.path.startswith(("/", ".", "~")):
        if not (path / LEROBOT_MARK).is_file():
            raise ConfigError(
                f"{key}: there is no LeRobotDataset at {path} ({LEROBOT_MARK} is missing): specify its folder, or a "
                f"data set on the hub"
            )
        return path, None
    recorded = HF_LEROBOT_HOME / path
    if config.revision is None and (recorded / LEROBOT_MARK).is_file():
        return recorded, None
    snapshot = fetch_files(config, key, ["meta/**"], config.revision or CODEBASE_VERSION)
    return snapshot, snapshot.name


def fetch_files(config: LeRobotData, key: str, files: list[str], revision: str) -> Path:
    """A hub data set's folder in LeRobot's cache, with these files. Offline, only cached files are used."""
    try:
        return Path(
            snapshot_download(
                config.path,
                repo_type="dataset",
                revision=revision,
                cache_dir=HF_LEROBOT_HUB_CACHE,
                allow_patterns=files,
                local_files_only=is_offline_mode(),  # otherwise it requests the list of a commit's files
            )
        )
    except Exception as error:  # the hub's client may raise any exception
        raise ConfigError(
            f"{key}: there is no folder {config.path}, and no LeRobotDataset of that name with revision {revision} on "
            f"the hub or in its local cache ({first_line(error)}): specify a folder, or download it while online"
        ) from None


@contextmanager
def damage_reported(config: LeRobotData, key: str) -> Iterator[None]:
    """Report any error that a damaged file causes in one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = f"{cause} is missing" if isinstance(cause, KeyError) else first_line(cause)
        raise ConfigError(
            f"{key}: the LeRobotDataset {config.path} is damaged or incomplete ({reason}): download it again, or "
            f"complete its recording (finalize)"
        ) from None


def read_metadata(root: Path, config: LeRobotData, key: str) -> tuple[list[Feature], Layout]:
    """The features and the layout from meta/info.json and meta/episodes.

    Raises:
        ConfigError: the data set is of another version, or a named feature is missing.
        DataError: it holds no frames.
    """
    info = json.loads((root / LEROBOT_MARK).read_text(encoding="utf-8"))
    _check_version(info["codebase_version"], config, key)
    features = _features(info["features"], config, key)
    if not info["total_frames"]:
        raise DataError(f"{key}: {config.path} holds no frame: specify a data set with at least one episode")
    return features, _layout(root, info, features)


def _check_version(found: str, config: LeRobotData, key: str) -> None:
    theirs, ours = Version(found).major, Version(CODEBASE_VERSION).major
    if theirs != ours:
        convert = f"convert it with {CONVERTER} (which pushes it to the hub by default)"
        remedy = convert if theirs < ours else "install a LeRobot version that reads it"
        raise ConfigError(
            f"{key}: {config.path} is a LeRobotDataset of version {found}, but LeRobot {version('lerobot')} reads "
            f"{CODEBASE_VERSION}: {remedy}"
        )


def _features(stored: Mapping[str, Mapping[str, Any]], config: LeRobotData, key: str) -> list[Feature]:
    """The features that become part of a sample: pictures, observations and the action."""
    present = [name for name in stored if name not in DEFAULT_FEATURES]
    for name in config.rename:
        if name not in present:
            raise ConfigError(
                f"{key}.rename names '{name}', but {config.path} has the features {', '.join(present)}: "
                f"rename one of those"
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
                f"different name"
            )
        features[ours] = Feature(name, ours, dtype, shape)
    for name, ours in config.rename.items():
        if ours not in features:
            raise ConfigError(
                f"{key}.rename turns {name} of {config.path} into {ours}, which a sample cannot hold: rename it to "
                f"{ACTION}, or to a name that starts with {OBSERVATION}"
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
            f"{key}: {name} of {config.path} is {what}, but only pictures with three colours are supported: "
            f"remove it from the data set"
        )
    return shape


def _layout(root: Path, info: Mapping[str, Any], features: Sequence[Feature]) -> Layout:
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    rows: list[dict[str, Any]] = []
    for file in files:
        names = [name for name in column_names(file) if not name.startswith("stats/")]
        rows += _read_table(file, names).to_pylist()
    rows.sort(key=lambda row: row["episode_index"])
    if [row["episode_index"] for row in rows] != list(range(info["total_episodes"])):
        raise ValueError(
            f"meta/info.json counts {info['total_episodes']} episodes, but meta/episodes lists {len(rows)}"
        )
    cameras = tuple(feature.stored for feature in features if feature.dtype == "video")
    return Layout(rows, info["data_path"], info["video_path"] if cameras else None, cameras)


def chosen_episodes(count: int, config: LeRobotData, key: str) -> list[int]:
    """The episodes to read, in the order of the data set."""
    if config.episodes is None:
        return list(range(count))
    for episode in config.episodes:
        if episode >= count:
            raise ConfigError(
                f"{key}.episodes names {episode}, but {config.path} has {count} episodes, 0 to {count - 1}: "
                f"choose from those"
            )
    return sorted(config.episodes)


# -- tables


def read_columns(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """Columns of numbers, [N, *shape] each, over all files."""
    tables = [_read_table(file, list(shapes)) for file in files]
    return {
        name: np.concatenate([_numbers(name, table[name], shape) for table in tables]) for name, shape in shapes.items()
    }


def column_names(file: Path) -> list[str]:
    try:
        return list(pq.read_schema(file).names)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {first_line(error)}") from None


def _read_table(file: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(file, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file}: {first_line(error)}") from None


def _numbers(name: str, column: pa.ChunkedArray, shape: tuple[int, ...]) -> NDArray[Any]:
    """A column as [N, *shape]; a single number may be stored without a list around it."""
    parts = []
    for chunk in column.chunks:
        values = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        for size in shape:
            if not pa.types.is_nested(values.type):
                break
            if values.null_count or set(pc.unique(pc.list_value_length(values)).to_pylist()) - {size}:
                raise ValueError(f"{name} does not have shape {list(shape)} in every row")
            values = values.flatten()
        array = values.to_numpy(zero_copy_only=False)
        if values.null_count or array.size != len(chunk) * int(np.prod(shape)):
            raise ValueError(f"{name} does not have shape {list(shape)} in every row")
        parts.append(array.reshape(len(chunk), *shape))
    return np.concatenate(parts)
