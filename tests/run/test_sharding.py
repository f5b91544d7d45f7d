"""Runs whose workers share one model: they are the runs of one worker, and their checkpoints fit any number of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from craft_pipelines.anchors import build
from safetensors.torch import load_file
from torch import Tensor

from craft_ray.config import Experiment, parse_config
from craft_ray.errors import CraftError, StorageError
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.sharded_checkpoint import FILES
from craft_ray.run.training import train
from craft_ray.workers import OneWorker, Workers
from tests.support.processes import on_workers

STEPS = 4
SHARDED = {"workers.num_workers": 2, "workers.sharding": "full"}
COLUMNS = {"id": "id", "prompt": "prompt", "response": "response"}

VARIANTS: dict[str, dict[str, Any]] = {
    "hidden": {},
    "hidden, every third step, accumulated": {"craft.retention_freq": 3, "train.accumulate": 2},
    "token_ce, accumulated": {"craft.retention_mode": "token_ce", "train.accumulate": 2, "craft.epsilon_start": 1.0},
    "one row": {"craft.use_grad_projection": False, "craft.log_angle": False, "craft.lambda_floor": 0.0},
    "baseline": {"craft.enabled": False},
    "checkpointed": {"model.gradient_checkpointing": True},
}


def experiment(model: Path, data: Path, folder: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    """A few steps of the byte-level Llama, whose embeddings are tied, with 7 held-out rows, which two workers cannot
    share evenly."""

    def held_out(skill: str, metric: str) -> dict[str, Any]:
        source = {"path": str(data / f"{skill}_test.parquet"), "columns": COLUMNS, "limit": 7}
        return {"data": source, "metric": metric, "batch_size": 2}

    tree = {
        "output_dir": str(folder / "runs"),
        "model": {"kind": "causal_lm", "path": str(model)},
        "task": {"path": str(data / "new_train.parquet"), "columns": COLUMNS, "limit": 64},
        "anchors": {
            "source": {"path": str(data / "anchors.parquet"), "columns": {"id": "id"}, "limit": 37},
            "positions": ["last_token"],
            "modes": ["hidden", "token_ce"],
            "max_new_tokens": 3,
        },
        "craft": {
            "anchor_cache_dir": str(folder / "anchors"),
            "anchor_batch_size": 4,
            "epsilon_start": 1e-3,
            "conflict_threshold": 0.9,  # the projection fires at every retention step
            "projection_gate": "always",
        },
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 2e-3, "check_minutes": 0, "checkpoint_every": 2},
        "evaluation": {"old": held_out("old", "perplexity"), "new": held_out("new", "exact_match")},
        "workers": {"num_workers": 0},
    }
    tree["evaluation"]["new"]["max_new_tokens"] = 4
    return parse_config(tree, "test").changed(changes or {})


def run_of(workers: Workers, config: Experiment, path: Path) -> None:
    folder = RunFolder(path)
    if workers.rank == 0:
        folder.begin(config, ["test"])
    workers.gather(None)
    train(config, folder, workers, NullObserver())


def all_of(workers: Workers, runs: dict[Path, Experiment]) -> None:
    for path, config in runs.items():
        run_of(workers, config, path)


@pytest.fixture(scope="module")
def world(text_model: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, and each variant trained by one worker and by two that share the model."""
    folder = tmp_path_factory.mktemp("sharding")
    build(experiment(text_model, text_data, folder), say=lambda _: None)
    one = {
        folder / "one" / name: experiment(text_model, text_data, folder, changes) for name, changes in VARIANTS.items()
    }
    all_of(OneWorker(), one)
    two = {folder / "two" / path.name: config.changed(SHARDED) for path, config in one.items()}
    on_workers(2, all_of, folder / "processes", two)
    return folder


def weights(path: Path, name: str = "last") -> dict[str, Tensor]:
    return load_file(path / "checkpoints" / name / "model" / "model.safetensors")


def measured(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in RunFolder(path).read_metrics()]


@pytest.mark.parametrize("name", VARIANTS)
def test_two_workers_that_share_a_model_are_one(name: str, world: Path) -> None:
    one, two = world / "one" / name, world / "two" / name
    for expected, found in zip(measured(one), measured(two), strict=True):
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-5, nan_ok=True)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=2e-5)
    expected, found = (json.loads((path / "result.json").read_text()) for path in (one, two))
    for skill in ("old", "new"):
        assert found[skill] == pytest.approx(expected[skill], rel=1e-3)
    assert found.get("retention_loss") == pytest.approx(expected.get("retention_loss"), rel=2e-3)


def test_the_projection_fires(world: Path) -> None:
    fired = [record["craft/projected"] for record in measured(world / "two" / "hidden")]
    assert fired == [1.0] * STEPS
