"""The recorded files of a LeRobotDataset: where they are, what its metadata says, and its tables of numbers.

LeRobot's own reader keeps a copy of a table by path and time, and serves the old one when a data set was rewritten in
place, so tables are read here.
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
"""How the types begin of which a vector can be made; there are texts, too."""

CONVERTER = "python -m lerobot.scripts.convert_dataset_v21_to_v30"


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


# -- where it is and what it says of itself


def find_dataset(config: LeRobotData, key: str) -> tuple[Path, str | None]:
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
    snapshot = fetch_files(config, key, ["meta/**"], config.revision or CODEBASE_VERSION)
    return snapshot, snapshot.name


def fetch_files(config: LeRobotData, key: str, files: list[str], revision: str) -> Path:
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
def damage_reported(config: LeRobotData, key: str) -> Iterator[None]:
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


def read_metadata(root: Path, config: LeRobotData, key: str) -> tuple[list[Feature], Layout]:
    """What meta/info.json and meta/episodes say.

    Raises:
        ConfigError: the data set is of another version, or a named feature is missing.
        DataError: it holds no frame.
    """
    info = json.loads((root / LEROBOT_MARK).read_text(encoding="utf-8"))
    _check_version(info["codebase_version"], config, key)
    features = _features(info["features"], config, key)
    if not info["total_frames"]:
        raise DataError(f"{key}: {config.path} holds no frame; name a data set with at least one episode")
    return features, _layout(root, info, features)


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
        names = [name for name in column_names(file) if not name.startswith("stats/")]
        rows += _read_table(file, names).to_pylist()
    rows.sort(key=lambda row: row["episode_index"])
    if [row["episode_index"] for row in rows] != list(range(info["total_episodes"])):
        raise ValueError(f"meta/info.json counts {info['total_episodes']} episodes, meta/episodes names {len(rows)}")
    cameras = tuple(feature.stored for feature in features if feature.dtype == "video")
    return Layout(rows, info["data_path"], info["video_path"] if cameras else None, cameras)


def chosen_episodes(count: int, config: LeRobotData, key: str) -> list[int]:
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
