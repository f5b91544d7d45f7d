"""Caches built by Ray processes: a killed teacher costs only time, and a user's mistake stays one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from craft_pipelines import build_progress
from craft_pipelines.anchors import build
from craft_pipelines.build_progress import BuildProgress, Telling, heard
from craft_pipelines.session import join

from craft_ray.config import Experiment, dump_config
from craft_ray.errors import ConfigError
from tests.support.caches import built, cache_folder, table
from tests.support.experiments import Digits

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def start_build(config: Experiment, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(dump_config(config))
    return subprocess.Popen(
        [sys.executable, "-m", "craft_pipelines.cli", "anchors", "build", str(folder / "run.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def processes(driver: subprocess.Popen[str], what: str) -> list[psutil.Process]:
    """Processes below the driver of one class of `craft_pipelines.teachers`."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if any(what in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def on_ray(digits: Digits, folder: Path, **changes: object) -> Experiment:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return digits.experiment(folder, {"workers.num_workers": 1, **dotted})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("readers", "victim"),
    [(0, "ShardWriter"), (1, "AnchorReader"), (1, "GroupTeacher"), (1, "GroupWriter")],
)
def test_a_process_killed_in_the_middle_costs_no_anchor(
    readers: int, victim: str, digits: Digits, tmp_path: Path
) -> None:
    config = on_ray(digits, tmp_path, anchors__rows_per_shard=2, anchors__readers=readers)
    driver = start_build(config, tmp_path)
    folder = cache_folder(config) / "shards"
    while driver.poll() is None and len(list(folder.glob("*.parquet"))) < 2:
        time.sleep(0.02)
    (killed,) = processes(driver, victim)
    killed.kill()
    present = len(list(folder.glob("*.parquet")))
    out, err = driver.communicate(timeout=400)

    assert driver.returncode == 0, err
    assert present < 24, "it was killed too late to test anything"
    given = pq.read_table(digits.data / "anchors.parquet", columns=["id"])["id"].to_pylist()[:48]
    assert table(cache_folder(config))["id"].to_pylist() == given
    assert "anchor cache complete: 48 anchors" in out
    assert all("(raylet)" in line for line in err.splitlines()), err  # it reports the death; nothing else is printed
    assert not list(folder.glob(".*"))
    assert build(config, say=lambda _: None).rows_computed == 0

    whole = config.changed({"craft.anchor_cache_dir": str(tmp_path / "whole"), "workers.num_workers": 0})
    assert built(whole).content == build(config, say=lambda _: None).manifest.content


@pytest.mark.parametrize("readers", [0, 1])
def test_a_mistake_in_an_anchor_is_one_line(readers: int, digits: Digits, tmp_path: Path) -> None:
    anchors = pq.read_table(digits.data / "anchors.parquet").slice(0, 40).to_pydict()
    anchors["image"][37] = b"no image at all"
    pq.write_table(pa.table(anchors), tmp_path / "bad.parquet")
    bad = str(tmp_path / "bad.parquet")
    config = on_ray(digits, tmp_path, anchors__source__path=bad, anchors__readers=readers)
    driver = start_build(config, tmp_path)
    _, err = driver.communicate(timeout=400)
    assert driver.returncode == 1
    (line,) = err.splitlines()
    assert f"row 37 (id {anchors['id'][37]})" in line
    assert "does not decode" in line


@pytest.mark.slow
def test_three_stages_write_the_shards_that_a_teacher_alone_writes(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("craft_ray.anchors.build.ROW_GROUP", 4)
    config = on_ray(digits, tmp_path, anchors__rows_per_shard=10, anchors__readers=1)
    alone = config.changed({"craft.anchor_cache_dir": str(tmp_path / "alone"), "workers.num_workers": 0})
    staged = build(config, say=lambda _: None)
    assert staged.rows_computed == 48
    assert staged.manifest.content == built(alone).content
    assert staged.manifest.shards == built(alone).shards, "to the byte"
    assert build(config, say=lambda _: None).rows_computed == 0


def test_readers_beyond_the_cluster_are_one_line(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"anchors\.actors and anchors\.readers need 1 x 1001 CPU"):
        build(on_ray(digits, tmp_path, anchors__readers=1000), say=lambda _: None)


def test_teachers_tell_how_far_their_shards_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_progress, "POLL_S", 0.1)
    monkeypatch.setattr("craft_ray.pace.SAY_S", 0.0)
    join()
    reports: list[tuple[float, int]] = []
    progress = BuildProgress(100, 20, lambda *report: reports.append(report[1:3]))
    teacher = ray.remote(num_cpus=0)(lambda telling, name, rows: telling(name, rows))
    with heard("first", progress):
        for rows in (5.0, 12.5):
            ray.get(teacher.remote(Telling("first"), "shard-00001", rows))
            ray.get(teacher.remote(Telling("other build"), "shard-00001", 70.0))
            time.sleep(0.5)
    assert reports[-1] == (32.5, 100), "what another build tells does not count"
    progress.passed("shard-00002/8", 2.0)
    assert reports[-1] == (34.5, 100), "a row group is part of its shard"
    progress.wrote("shard-00002", 0)
    progress.wrote("shard-00001", 30)
    progress.passed("shard-00001", 29.0)
    progress.end()
    assert reports[-1] == (50.0, 100), "a complete shard counts once"
