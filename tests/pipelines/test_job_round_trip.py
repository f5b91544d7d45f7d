"""From start to results: a cluster with a token, each stage as a job on it, results fetched, and the cluster ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from craft_ray.anchors.manifest import read_manifest
from craft_ray.config import dump_config, load_config
from craft_ray.run.folder import RunFolder
from craft_ray.storage.last import last_checkpoint
from craft_ray.storage.paths import ObjectPath, copy_tree, readable
from tests.support.experiments import Digits
from tests.support.local_cluster import exported, local, marked
from tests.support.sweeps import validated

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def craft_ray(environment: dict[str, str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the command in `folder` as a user without credentials for the store: only the nodes have them."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "AWS_SECRET_ACCESS_KEY"}
    done = subprocess.run(
        [sys.executable, "-m", "craft_pipelines.cli", *arguments],
        cwd=folder, env=clean | environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_every_stage_as_a_job(
    digits: Digits, object_store: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = object_store / "jobs"
    copy_tree(digits.model, store / "model")
    copy_tree(digits.data, store / "data")
    places = {
        "model.path": f"{store}/model", "task.path": f"{store}/data/new_train.parquet",
        "anchors.source.path": f"{store}/data/anchors.parquet", "anchors.actors": 2,
        "craft.anchor_cache_dir": f"{store}/anchors", "output_dir": f"{store}/runs",
        "objective": {"maximize": "new/ratio"}, "sweep": {"scheduler": "none"}, "workers.num_workers": 2,
    }  # fmt: skip
    held_out = {**digits.scored(), **{k: v for k, v in validated(digits.data).items() if k != "objective"}}
    config = digits.experiment(tmp_path, {**held_out, **places})
    work = tmp_path / "work"
    work.mkdir()
    text = dump_config(config).replace(f"{digits.data}/", f"{store}/data/")
    (work / "run.yaml").write_text(text)
    (work / "space.yaml").write_text("train.learning_rate: {loguniform: [5.0e-4, 4.0e-3]}\n")

    monkeypatch.setenv("CRAFT_RAY_CACHE", str(tmp_path / "node"))
    code, out, err = local(tmp_path / "cluster", "start", "--nodes", "2", "--cpus", "1", "--object-store", "100")
    assert code == 0, err
    environment = exported(out)
    mark = json.loads((tmp_path / "cluster" / "cluster.json").read_text())["mark"]
    try:

        def job(*command: str) -> tuple[int, str, str]:
            return craft_ray(environment, work, "submit", "--", "craft-ray", *command)

        code, out, err = job("anchors", "build", "run.yaml")
        assert code == 0, out + err
        assert "anchor cache complete: 48 anchors" in out
        assert read_manifest(store / "anchors").identity.rows == 48

        code, out, err = job("train", "run.yaml")
        assert code == 3, out + err  # six steps do not meet such a small budget
        assert "Step 6/6" in out
        assert "2 worker(s)" in out
        assert "NOT met" in out
        run = RunFolder(store / "runs" / "digits-hidden-seed0")
        result = run.finished()
        assert result is not None
        assert result["feasible"] is False
        last = last_checkpoint(run.checkpoints)
        assert last is not None
        assert (last / "model" / "model.safetensors").exists()

        code, out, err = job(
            "sweep", "run.yaml", "--space", "space.yaml", "--samples", "4", "--out", f"{store}/sweep",
            "workers.num_workers=1",
        )  # fmt: skip
        assert code == 0, out + err
        rows = pq.read_table(readable(store / "sweep" / "trials.parquet")).to_pylist()
        assert [row["status"] for row in rows] == ["finished"] * 4
        (work / "best.yaml").write_text((store / "sweep" / "best.yaml").read_text())
        (best,) = [row for row in rows if row["rank"] == 1]
        assert load_config(work / "best.yaml").train.learning_rate == best["param:train.learning_rate"]

        code, out, err = job("train", "run.yaml", "craft.lambda_lrr=1")
        assert code == 2, out + err
        assert "did you mean craft.lambda_lr?" in out + err
        code, out, err = job("train", "run.yaml", "output_dir=runs", "name=lost")
        assert code == 2, out + err
        assert "in the working directory that is uploaded with the job" in out + err

        # A user with credentials for the store fetches the results.
        report = ["report", f"{store}/runs/digits-hidden-seed0", "--out", str(work)]
        done = subprocess.run(
            [sys.executable, "-m", "craft_pipelines.cli", *report], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert (work / "report.html").exists()
    finally:
        code, _, err = local(tmp_path / "cluster", "stop")
    assert code == 0, err
    assert not marked(mark), "nothing is left running"
