"""A first config for a policy: a cache is built and a run trained with it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lerobot")

from craft_pipelines.anchors import build
from craft_pipelines.room import PROCESS, worker_memory

from craft_ray.anchors.manifest import read_manifest
from craft_ray.config import parse_config
from craft_ray.config.loading import read_yaml
from craft_ray.init.draft import Asked, draft
from craft_ray.init.model import stored_parameters
from craft_ray.init.sizes import Hardware
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker
from tests.support.robots import small_policy, write_dataset

LAPTOP = Hardware(gpu=False, memory=8 * 2**30, cpus=2)
SMALL = {
    "train.steps": 2, "train.warmup_steps": 1, "train.batch_size": 4, "craft.anchor_batch_size": 4,
    "workers.num_workers": 0,
}  # fmt: skip


@pytest.mark.parametrize("preset", [None, "robot", "lora"])
def test_a_policy_is_trained_with_its_draft(preset: str | None, tmp_path: Path) -> None:
    tasks = ("Close the drawer.", "Close the door.")
    small_policy(tmp_path / "policy", cameras=("top",), tasks=tasks)
    for name, task in zip(("old", "new"), tasks, strict=True):
        write_dataset(tmp_path / name, task=task)
    asked = Asked(str(tmp_path / "policy"), str(tmp_path / "new"), str(tmp_path / "old"), preset=preset)
    text = draft(asked, LAPTOP)
    assert "learning_rate: 5.0e-4" in text  # of a policy that is as small as this one
    config = parse_config(read_yaml(text), "draft").changed({"output_dir": str(tmp_path / "runs"), **SMALL})
    assert config.model.kind == "lerobot"
    assert (config.adapter is not None) == (preset == "lora")
    config = config.changed({"craft.anchor_cache_dir": str(tmp_path / "anchors")})
    build(config, say=lambda _: None)
    assert read_manifest(tmp_path / "anchors").identity.rows > 0
    run = RunFolder(tmp_path / "runs" / "run")
    run.begin(config, ["test"])
    train(config, run, OneWorker(), NullObserver())
    assert (run.finished() or {})["steps"] == 2


def test_the_memory_of_a_policys_run_is_estimated_from_its_files(tmp_path: Path) -> None:
    """Whatever says that the data are robot frames: the format, or what lies in the folder."""
    small_policy(tmp_path / "policy", cameras=("top",), tasks=("push",))
    write_dataset(tmp_path / "new", task="push")
    tree = {
        "name": "robot",
        "model": {"kind": "lerobot", "path": str(tmp_path / "policy")},
        "task": {"path": str(tmp_path / "new")},
        "craft": {"enabled": False},
        "train": {"steps": 2, "batch_size": 4},
    }
    config = parse_config(tree, "test")
    parameters = stored_parameters(tmp_path / "policy")
    assert parameters > 50_000
    assert worker_memory(config) == PROCESS + 24 * parameters
    assert worker_memory(config.changed({"task.format": "lerobot"})) == PROCESS + 24 * parameters
