"""The shipped config of the earlier rule trains a policy, with its own optimiser."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lerobot")

from craft_pipelines.anchors import build

from craft_ray.config import load_config
from craft_ray.shipped import shipped
from tests.support.robots import small_policy, write_dataset
from tests.support.runs import trained

STEPS = 6


def test_the_shipped_config_trains(tmp_path: Path) -> None:
    small_policy(tmp_path / "policy", cameras=("top",), tasks=("old", "new"))
    for task in ("old", "new"):
        write_dataset(tmp_path / task, task=task)
    overrides = [
        *(f"model.path={tmp_path / 'policy'}", f"task.path={tmp_path / 'new'}"),
        *(f"anchors.source.path={tmp_path / 'old'}", "anchors.source.stride=1", "anchors.gpus_per_actor=0"),
        *(f"craft.anchor_cache_dir={tmp_path / 'anchors'}", "craft.anchor_batch_size=4"),
        *(f"train.steps={STEPS}", f"craft.epsilon_decay_steps={STEPS}", "train.batch_size=4", "train.precision=fp32"),
        *("workers.num_workers=0", "workers.use_gpu=false"),
    ]
    config = load_config(Path(shipped("pipelines/configs")) / "original_rule.yaml", overrides)
    build(config, say=lambda _: None)
    run = trained(config, tmp_path / "run")
    records = run.read_metrics()
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    held = [record for record in records if record["craft/retention_loss"] is not None]
    assert [record["step"] for record in held] == [1, 6], "every fifth step"
    assert held[1]["craft/epsilon"] == pytest.approx(1.0 - 0.9 * 5 / STEPS)
    assert held[1]["craft/lambda"] < held[0]["craft/lambda"] < 0.2, "the budget is far from exceeded"
