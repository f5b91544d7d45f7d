"""A LeRobotDataset gives what LeRobot gives, whichever part is read; anything else is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("lerobot")

import datasets
from lerobot.datasets import LeRobotDataset
from lerobot.utils.feature_utils import dataset_to_policy_features

import craft_ray.lerobot.recording as module
from craft_ray.data.frame import Frame
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, CraftError, DataError, StorageError
from craft_ray.lerobot.dataset import action_chunk
from tests.support.configs import data_config
from tests.support.robots import write_dataset

TOP, SIDE, STATE, ACTION = "observation.images.top", "observation.images.side", "observation.state", "action"
LENGTHS = (6, 4, 1, 5)


def source(path: Path | str, **settings: Any) -> Source:
    return open_source(data_config(path=str(path), **settings), "task")


def refusal(error: type[CraftError], make: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        make()
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    return caught.value.message


def frame(source: Source, row: int) -> Frame:
    found = source[row].frame
    assert found is not None
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets of 16 frames in 4 episodes, with two cameras. Shared: do not write into them."""
    folder = tmp_path_factory.mktemp("robots")
    settings: dict[str, Any] = {"episodes": 4, "frames": LENGTHS, "cameras": ("top", "side")}
    settings |= {"state": 3, "action": 2, "task": ("push", "pull it")}
    return {
        "images": write_dataset(folder / "images", **settings),
        "videos": write_dataset(folder / "videos", **settings, videos=True),
    }


@pytest.fixture
def images(folders: dict[str, Path]) -> Path:
    return folders["images"]


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folders["images"], tmp_path / "copy"))


@pytest.fixture
def copied_videos(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["videos"], tmp_path / "copy"))


def change_info(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def change_table(root: Path, file: str, change: Callable[[Any], Any]) -> None:
    """With the same schema, so that a list stays a list and pictures stay pairs of bytes and path."""
    path = root / file
    schema = pq.read_schema(path)
    rows = change(pq.read_table(path).to_pylist())
    pq.write_table(type(pq.read_table(path)).from_pylist(rows, schema=schema), path)


DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


# --- what a sample holds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["images", "videos"])
@pytest.mark.parametrize("episodes", [None, (1, 3), (2,)])
def test_every_frame_is_what_lerobot_gives(form: str, episodes: Any, folders: dict[str, Path]) -> None:
    root = folders[form]
    found = source(root, episodes=episodes)
    theirs = LeRobotDataset(root.name, root=root, episodes=None if episodes is None else list(episodes))
    assert len(found) == len(theirs)
    for row, sample in enumerate(found):
        item = theirs[row]
        assert sample.frame is not None
        assert sample.prompt == item["task"]
        assert sample.id == f"episode_{item['episode_index']:06d}-frame_{item['frame_index']:06d}"
        assert sample.image is sample.response is sample.choices is None
        assert set(sample.frame.images) == {TOP, SIDE}
        for name, picture in sample.frame.images.items():
            assert picture.dtype == np.uint8
            assert torch.equal(torch.tensor(picture).permute(2, 0, 1).float() / 255, item[name])
        assert set(sample.frame.state) == {STATE}
        assert sample.frame.state[STATE].dtype == np.float32
        assert np.array_equal(sample.frame.state[STATE], item[STATE].numpy())
        assert sample.frame.actions is not None
        assert np.array_equal(sample.frame.actions[0], item[ACTION].numpy())


@pytest.mark.parametrize("episodes", [None, (0, 1), (3, 1)])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_chunk_of_actions_is_what_lerobot_asks_for_with_delta_timestamps(
    episodes: Any, size: int, images: Path
) -> None:
    found = source(images, episodes=episodes)
    steps = {ACTION: [step / 10 for step in range(size)]}
    selection = None if episodes is None else list(episodes)
    theirs = LeRobotDataset(images.name, root=images, episodes=selection, delta_timestamps=steps)
    assert len(found) == len(theirs)
    for row, sample in enumerate(found):
        assert sample.frame is not None
        assert sample.frame.actions is not None
        chunk, is_pad = action_chunk(sample.frame.actions, size)
        assert chunk.shape == (size, 2)
        assert chunk.dtype == np.float32
        assert np.array_equal(chunk, theirs[row][ACTION].numpy())
        assert np.array_equal(is_pad, theirs[row]["action_is_pad"].numpy())


def test_actions_run_to_the_end_of_the_episode_and_are_not_copied(images: Path) -> None:
    found = source(images, limit=2, stride=2)  # what is not read still ends the episode
    first, third = frame(found, 0).actions, frame(found, 1).actions
    assert first is not None
    assert third is not None
    assert first.shape == (6, 2)
    assert np.array_equal(first[2:], third)
    assert np.shares_memory(first, third)
    assert not first.flags.writeable


def test_features_are_named_and_shaped_as_in_policies(folders: dict[str, Path]) -> None:
    for root in folders.values():
        found = source(root)
        policy = dataset_to_policy_features(LeRobotDataset(root.name, root=root).meta.features)
        assert found.features == {name: feature.shape for name, feature in policy.items()}
        assert found.features == {TOP: (3, 32, 32), SIDE: (3, 32, 32), STATE: (3,), ACTION: (2,)}
        assert found.has_responses
        assert found.name == str(root)


def test_pictures_that_are_not_square(tmp_path: Path) -> None:
    """Height and width keep their order, whichever way the data set states them."""
    root = tmp_path / "wide"
    features = {
        TOP: {"dtype": "image", "shape": (16, 24, 3), "names": ["height", "width", "channels"]},
        SIDE: {"dtype": "image", "shape": (3, 16, 24), "names": ["channels", "height", "width"]},
        STATE: {"dtype": "float32", "shape": (1,), "names": None},
        "observation.grid": {"dtype": "int64", "shape": (2, 3), "names": None},
        "observation.note": {"dtype": "string", "shape": (1,), "names": None},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    }
    wide = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    data = LeRobotDataset.create("wide", 10, features, root=root, use_videos=False)
    values = {STATE: np.float32([0.5]), "observation.grid": np.arange(6).reshape(2, 3), "observation.note": "x"}
    data.add_frame({TOP: wide, SIDE: wide, "next.reward": np.float32([1]), "task": "push", **values})
    data.save_episode()
    data.finalize()
    found = source(root)
    assert found.features == {TOP: (3, 16, 24), SIDE: (3, 16, 24), STATE: (1,), "observation.grid": (2, 3)}
    assert not found.has_responses
    held = frame(found, 0)
    assert held.actions is None
    assert np.array_equal(held.images[TOP], wide)
    assert np.array_equal(held.images[SIDE], wide)
    assert held.state[STATE].tolist() == [0.5]
    assert held.state["observation.grid"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert held.state["observation.grid"].dtype == np.float32


@pytest.mark.parametrize("form", ["images", "videos"])
def test_a_frame_survives_being_stored(form: str, folders: dict[str, Path]) -> None:
    for sample in source(folders[form], limit=3):
        assert sample.frame is not None
        back = Frame.from_bytes(sample.frame.to_bytes())
        assert set(back.images) == set(sample.frame.images)
        assert set(back.state) == set(sample.frame.state)
        for name, picture in sample.frame.images.items():
            assert np.array_equal(back.images[name], picture)
        for name, array in sample.frame.state.items():
            assert np.array_equal(back.state[name], array)
        assert back.actions is None


def test_rows_are_read_in_any_order_and_from_several_files(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "big", episodes=3, frames=5, size=300, file_mb=1)
    assert len(list(root.glob("data/*/*.parquet"))) == 3
    found = source(root)
    theirs = LeRobotDataset(root.name, root=root)
    for row in (14, 0, 7, 5, 4):
        assert torch.equal(torch.tensor(frame(found, row).images[TOP]).permute(2, 0, 1) / 255, theirs[row][TOP])
    last = source(root, episodes=(2,))
    assert last.ids() == found.ids()[10:]
    for row in range(5):
        assert np.array_equal(frame(last, row).images[TOP], frame(found, 10 + row).images[TOP])
    (root / "data/chunk-000/file-000.parquet").unlink()
    assert source(root, episodes=(2,)).ids() == last.ids()
    assert "file-000.parquet is missing" in refusal(ConfigError, lambda: source(root))


# --- what is read of a data set -----------------------------------------------------------------------------------


def test_ids_name_episode_and_frame_whatever_is_selected(images: Path) -> None:
    every = source(images).ids()
    assert len(set(every)) == len(every) == sum(LENGTHS)
    assert every[0] == "episode_000000-frame_000000"
    assert every[-1] == "episode_000003-frame_000004"
    for settings in ({"episodes": ("1-2",)}, {"episodes": (3, 1)}, {"stride": 2}, {"limit": 5}):
        found = source(images, **settings)
        assert [sample.id for sample in found] == found.ids()
        assert [i for i in every if i in found.ids()] == found.ids()


def test_a_stride_starts_with_the_first_frame_of_each_episode(images: Path) -> None:
    frames = [(0, 0), (0, 3), (1, 0), (1, 3), (2, 0), (3, 0), (3, 3)]
    ids = [f"episode_{episode:06d}-frame_{frame:06d}" for episode, frame in frames]
    assert source(images, stride=3).ids() == ids
    assert source(images, stride=3, limit=4).ids() == ids[:4]
    assert source(images, stride=3, episodes=(1, 3)).ids() == [*ids[2:4], *ids[5:]]


def test_renamed_features_have_their_new_names(images: Path) -> None:
    names = {TOP: "observation.images.base_0_rgb", STATE: "observation.joints"}
    found, plain = source(images, rename=names), source(images)
    assert found.features == {names[TOP]: (3, 32, 32), SIDE: (3, 32, 32), names[STATE]: (3,), ACTION: (2,)}
    ours, theirs = frame(found, 4), frame(plain, 4)
    assert set(ours.images) == {names[TOP], SIDE}
    assert np.array_equal(ours.images[names[TOP]], theirs.images[TOP])
    assert np.array_equal(ours.state[names[STATE]], theirs.state[STATE])


def test_names_can_be_swapped(images: Path) -> None:
    ours, theirs = frame(source(images, rename={TOP: SIDE, SIDE: TOP}), 3), frame(source(images), 3)
    assert np.array_equal(ours.images[TOP], theirs.images[SIDE])
    assert np.array_equal(ours.images[SIDE], theirs.images[TOP])


def test_a_feature_outside_the_conventions_is_read_once_it_has_a_conventional_name(images: Path, copy: Path) -> None:
    def move(info: dict[str, Any]) -> None:
        info["features"] = {{STATE: "state", ACTION: "actions"}.get(k, k): v for k, v in info["features"].items()}

    change_info(copy, move)
    table = pq.read_table(copy / DATA)
    names = [{STATE: "state", ACTION: "actions"}.get(name, name) for name in table.column_names]
    pq.write_table(table.rename_columns(names).replace_schema_metadata(None), copy / DATA)
    assert source(copy).features == {TOP: (3, 32, 32), SIDE: (3, 32, 32)}
    assert not source(copy).has_responses
    found = source(copy, rename={"state": STATE, "actions": ACTION})
    assert found.features == source(images).features
    assert np.array_equal(frame(found, 5).actions, frame(source(images), 5).actions)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"episodes": (1, 4)}, "task.episodes names 4, but {} has 4 episodes, 0 to 3"),
        (
            {"rename": {"top": TOP}},
            f"task.rename names 'top', but {{}} has the features {STATE}, {ACTION}, {TOP}, ",
        ),
        ({"rename": {TOP: SIDE}}, f"task.rename: {TOP} and {SIDE} of {{}} would both be {SIDE}"),
        ({"rename": {"timestamp": STATE}}, "task.rename names 'timestamp'"),
        ({"rename": {STATE: "state"}}, f"task.rename turns {STATE} of {{}} into state, which a sample cannot hold"),
    ],
)
def test_a_selection_that_is_not_in_the_data_set_is_refused(settings: dict[str, Any], words: str, images: Path) -> None:
    assert words.format(images) in refusal(ConfigError, lambda: source(images, **settings))


# --- identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["images", "videos"])
def test_the_fingerprint_does_not_depend_on_the_path(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders[form], tmp_path / "task_index=1" / "else [where]*")
    assert source(copy).fingerprint == source(folders[form]).fingerprint
    assert source(copy).ids() == source(folders[form]).ids()


def test_the_fingerprint_depends_on_every_selection(folders: dict[str, Path]) -> None:
    images = folders["images"]
    settings: list[dict[str, Any]] = [
        {}, {"stride": 2}, {"limit": 3}, {"episodes": (0,)}, {"episodes": (1,)}, {"rename": {TOP: "observation.image"}},
    ]  # fmt: skip
    found = [source(images, **s).fingerprint for s in settings] + [source(folders["videos"]).fingerprint]
    assert len(set(found)) == len(found)
    assert source(images, episodes=(3, 1)).fingerprint == source(images, episodes=(1, 3)).fingerprint


def one_pixel(row: dict[str, Any]) -> None:
    from craft_ray.data.frame import _pixels, _png

    pixels = _pixels(row[TOP]["bytes"]).copy()
    pixels[7, 9, 1] ^= 1
    row[TOP] = {**row[TOP], "bytes": _png(pixels)}


def one_action(row: dict[str, Any]) -> None:
    row[ACTION] = [row[ACTION][0] + 0.25, row[ACTION][1]]


@pytest.mark.parametrize("change", [one_pixel, one_action])
def test_a_data_set_that_was_rewritten_in_place_is_read_again(
    change: Callable[[dict[str, Any]], None], copy: Path
) -> None:
    """With its old modification time, by which the caches of the underlying libraries would take it for the old one."""
    os.utime(copy / DATA, (1e9, 1e9))
    before = source(copy)
    fingerprint, old = before.fingerprint, frame(before, 8)

    def changed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        change(rows[8])
        return rows

    change_table(copy, DATA, changed)
    os.utime(copy / DATA, (1e9, 1e9))
    after = source(copy)
    new = frame(after, 8)
    assert after.fingerprint != fingerprint
    assert old.actions is not None
    assert new.actions is not None
    differences = {
        one_pixel: int((new.images[TOP] != old.images[TOP]).sum()), one_action: int((new.actions != old.actions).sum()),
    }  # fmt: skip
    assert {made: count for made, count in differences.items() if count} == {change: 1}


def test_the_tasks_of_a_rewritten_data_set_are_read_again(tmp_path: Path) -> None:
    for task in ("push", "pull"):
        root = write_dataset(tmp_path / "data", episodes=1, frames=2, size=8, task=task)
        for file in root.rglob("*"):
            os.utime(file, (1e9, 1e9))
        assert [sample.prompt for sample in source(root)] == [task, task]
        shutil.rmtree(root)


def test_a_changed_video_is_another_data_set(copied_videos: Path) -> None:
    before = source(copied_videos).fingerprint
    file = next(copied_videos.glob(f"videos/{TOP}/*/*.mp4"))
    file.write_bytes(file.read_bytes() + b"\0")
    assert source(copied_videos).fingerprint != before


@pytest.mark.slow
def test_several_processes_open_the_same_data_set_at_once(images: Path, tmp_path: Path) -> None:
    """With an empty cache, which each of them fills."""
    program = f"""
from craft_ray.config import AutoData
from craft_ray.data.source import open_source
found = open_source(AutoData(path={str(images)!r}), "task")
print(found.fingerprint, sum(int(p.astype(int).sum()) for s in found for p in s.frame.images.values()))
"""
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=400)[0] for process in started}
    total = sum(int(p.astype(int).sum()) for s in source(images) for p in s.frame.images.values())  # type: ignore[union-attr]
    assert outputs == {f"{source(images).fingerprint} {total}\n"}
    assert [process.returncode for process in started] == [0, 0]


def test_nothing_is_written_beside_the_data(folders: dict[str, Path]) -> None:
    for root in folders.values():
        before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
        assert len(list(source(root, limit=2))) == 2
        assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*")) == before


# --- locating a data set ------ ------------------------------------------------------------------------------------


def test_the_format_is_recognised_from_the_folder_and_can_be_specified(images: Path) -> None:
    assert source(images).ids() == source(images, format="lerobot").ids()


def test_a_hub_data_set_that_is_in_the_cache(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HF_LEROBOT_HOME", tmp_path)
    monkeypatch.setattr(module, "HF_LEROBOT_HUB_CACHE", tmp_path / "hub")
    commits = {"v3.0": "a" * 40, "mine": "b" * 40}
    stored = tmp_path / "hub" / "datasets--someone--arm"
    for name, commit in commits.items():
        (stored / "refs").mkdir(parents=True, exist_ok=True)
        (stored / "refs" / name).write_text(commit)
        shutil.copytree(images, stored / "snapshots" / commit)
    change_info(stored / "snapshots" / commits["mine"], lambda info: info.update(robot_type="arm"))
    plain = source("someone/arm", format="lerobot")
    assert plain.ids() == source(images).ids()
    assert plain.fingerprint == source(images).fingerprint
    assert plain.fingerprint == source("someone/arm", format="lerobot", revision=commits["v3.0"]).fingerprint
    assert plain.fingerprint != source("someone/arm", format="lerobot", revision="mine").fingerprint
    message = refusal(ConfigError, lambda: source("someone/arm", format="lerobot", revision="other"))
    assert "no LeRobotDataset of that name with revision other" in message
    (stored / "snapshots" / commits["v3.0"] / DATA).unlink()
    assert f"{DATA} is missing" in refusal(ConfigError, lambda: source("someone/arm", format="lerobot"))


def test_a_data_set_that_lerobot_recorded_is_found_by_its_name(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HF_LEROBOT_HOME", tmp_path)
    shutil.copytree(images, tmp_path / "me" / "arm")
    assert source("me/arm", format="lerobot").ids() == source(images).ids()


@pytest.mark.parametrize("path", ["/no/where", "./none", "craft-ray-tests/none", "not a name!"])
def test_a_data_set_that_does_not_exist(path: str) -> None:
    message = refusal(ConfigError, lambda: source(path, format="lerobot"))
    assert message.startswith("task: there is no ")
    assert str(Path(path)) in message


def test_a_folder_without_a_data_set(tmp_path: Path) -> None:
    assert "there is no LeRobotDataset at" in refusal(ConfigError, lambda: source(tmp_path, format="lerobot"))


# --- damaged data sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "remedy"), [("v2.1", "convert it with python -m lerobot.scripts."), ("v4.0", "install a LeRobot")]
)
def test_another_version_of_the_format(version: str, remedy: str, copy: Path) -> None:
    change_info(copy, lambda info: info.update(codebase_version=version))
    message = refusal(ConfigError, lambda: source(copy))
    assert f"is a LeRobotDataset of version {version}" in message
    assert "reads v3.0" in message
    assert remedy in message


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tables": (lambda root: shutil.rmtree(root / "data"), f"{DATA} is missing"),
    "no tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), "tasks.parquet"),
    "no episodes": (lambda root: shutil.rmtree(root / "meta/episodes"), "counts 4 episodes, but meta/episodes lists 0"),
    "cut episodes": (
        lambda root: (root / EPISODES).write_bytes((root / EPISODES).read_bytes()[:-40]),
        EPISODES,
    ),
    "cut table": (lambda root: (root / DATA).write_bytes((root / DATA).read_bytes()[:-40]), DATA),
    "empty table": (lambda root: (root / DATA).write_bytes(b""), DATA),
    "info is not JSON": (lambda root: (root / "meta/info.json").write_text("{"), "line 1"),
    "info is a list": (lambda root: (root / "meta/info.json").write_text("[]"), "indices"),
    "no version": (lambda root: change_info(root, lambda info: info.pop("codebase_version")), "version' is missing"),
    "no type": (lambda root: change_info(root, lambda info: info["features"][TOP].pop("dtype")), "'dtype' is missing"),
    "more episodes than there are": (
        lambda root: change_info(root, lambda info: info.update(total_episodes=5)),
        "counts 5 episodes, but meta/episodes lists 4",
    ),
    "no such column": (
        lambda root: change_info(root, lambda i: i["features"].update({"observation.x": i["features"][STATE]})),
        "observation.x",
    ),
    "no such camera": (
        lambda root: change_info(root, lambda i: i["features"].update({"observation.x": i["features"][TOP]})),
        "observation.x",
    ),
    "another shape": (
        lambda root: change_info(root, lambda info: info["features"][STATE].update(shape=[4])),
        f"{STATE} does not have shape [4] in every row",
    ),
    "lost rows": (lambda root: change_table(root, DATA, lambda rows: rows[:-1]), "5 frames of episode 3"),
    "rows out of order": (lambda root: change_table(root, DATA, lambda rows: rows[::-1]), "6 frames of episode 0"),
    "a task that does not exist": (
        lambda root: change_table(root, DATA, lambda rows: [{**row, "task_index": 7} for row in rows]),
        "has task 7, but meta/tasks.parquet has 2 tasks",
    ),
    "a missing value": (
        lambda root: change_table(root, DATA, lambda rows: [{**rows[0], ACTION: None}, *rows[1:]]),
        f"{ACTION} does not have shape [2] in every row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_reported_in_one_line(damage: str, copy: Path) -> None:
    do, words = DAMAGE[damage]
    do(copy)
    message = refusal(ConfigError, lambda: source(copy))
    assert message.startswith(f"task: the LeRobotDataset {copy} is damaged or incomplete (")
    assert words in message


def test_a_video_that_is_missing_or_cut(copied_videos: Path) -> None:
    file = next(copied_videos.glob(f"videos/{TOP}/*/*.mp4"))
    file.write_bytes(file.read_bytes()[:700])
    found = source(copied_videos)
    message = refusal(DataError, lambda: list(found))
    assert f"episode_000000-frame_000000: {file} does not decode at 0.000 s" in message
    file.unlink()
    message = refusal(ConfigError, lambda: source(copied_videos))
    assert f"{file.relative_to(copied_videos)} is missing" in message


def test_a_picture_that_does_not_decode_or_has_another_size(copy: Path) -> None:
    def broken(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[1] = {**rows[1], SIDE: {"bytes": b"no picture", "path": None}}
        rows[2] = {**rows[2], SIDE: None}
        return rows

    change_table(copy, DATA, broken)
    found = source(copy)
    assert len(frame(found, 0).images) == 2
    assert "episode_000000-frame_000001: its image of 10 bytes" in refusal(DataError, lambda: found[1])
    assert "episode_000000-frame_000002: " in refusal(DataError, lambda: found[2])
    change_info(copy, lambda info: info["features"][SIDE].update(shape=[32, 48, 3]))
    message = refusal(DataError, lambda: source(copy)[0])
    assert f"{SIDE} is 32 x 32 pixels, but meta/info.json says 32 x 48" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"info": {"is_depth_map": True}}, "is a depth map"),
        ({"info": {"video.is_depth_map": True}}, "is a depth map"),
        ({"shape": [32, 32, 1]}, "is of shape [32, 32, 1]"),
        ({"shape": [1, 32, 32], "names": ["channels", "height", "width"]}, "is of shape [1, 32, 32]"),
    ],
)
def test_pictures_without_three_colours_are_refused(change: dict[str, Any], words: str, copy: Path) -> None:
    change_info(copy, lambda info: info["features"][SIDE].update(change))
    message = refusal(ConfigError, lambda: source(copy))
    assert f"{SIDE} of {copy} {words}" in message


def test_a_data_set_without_frames(tmp_path: Path) -> None:
    features = {STATE: {"dtype": "float32", "shape": (2,), "names": None}}
    LeRobotDataset.create("none", 10, features, root=tmp_path / "none", use_videos=False).finalize()
    assert "holds no frame" in refusal(DataError, lambda: source(tmp_path / "none"))


def test_pictures_that_no_space_is_left_for(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    message = refusal(StorageError, lambda: source(images))
    assert f"the pictures of {images} could not be unpacked into {tmp_path / 'file'}" in message
    assert "set HF_DATASETS_CACHE" in message


def test_frames_can_be_drawn_at_random(images: Path) -> None:
    """The same ones for a seed, in their order, after the stride and the limit; and they are part of the identity."""
    ids = source(images).ids()
    drawn = source(images, sample=4)
    assert len(drawn) == 4
    assert drawn.ids() == [name for name in ids if name in drawn.ids()]
    assert drawn.ids() == source(images, sample=4).ids() != ids[:4]
    assert drawn.ids() != source(images, sample=4, sample_seed=1).ids()
    assert source(images, sample=len(ids) + 1).ids() == ids
    assert set(source(images, stride=2, sample=3).ids()) <= set(source(images, stride=2).ids())
    prints = {source(images, **how).fingerprint for how in ({}, {"sample": 4}, {"sample": 4, "sample_seed": 1})}
    assert len(prints) == 3


def test_prompts_of_a_file_replace_the_words_of_the_tasks(images: Path, tmp_path: Path) -> None:
    file, texts = tmp_path / "prompts.json", ["Pick it up", "Put it down", "Let go"]
    for content in ({"prompts": texts}, texts):
        file.write_text(json.dumps(content))
        found = source(images, prompts=str(file))
        prompts = {sample.id: sample.prompt for sample in found}
        assert set(prompts.values()) == set(texts)
        part = source(images, prompts=str(file), stride=2)
        assert all(prompts[sample.id] == sample.prompt for sample in part), "a frame keeps its prompt"
    before = source(images, prompts=str(file)).fingerprint
    file.write_text(json.dumps(texts[:2]))
    assert len({before, source(images, prompts=str(file)).fingerprint, source(images).fingerprint}) == 3
    for wrong in ("[]", "{}", "[1]", '["a", ""]', "no json"):
        file.write_text(wrong)
        assert "is no JSON list of texts" in refusal(ConfigError, lambda: source(images, prompts=str(file)))
    assert "there is no such file" in refusal(ConfigError, lambda: source(images, prompts=str(tmp_path / "none")))
    assert f"prompts {tmp_path} does not open (Is a dir" in refusal(
        ConfigError, lambda: source(images, prompts=str(tmp_path))
    )
    file.write_text(json.dumps(["Let go", "half \ud83e"]))
    assert r"a prompt is 'half \ud83e' with '\ud83e', half of a character" in refusal(
        DataError, lambda: source(images, prompts=str(file))
    )
