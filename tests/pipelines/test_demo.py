"""The demo as a user runs it, on Ray, with its shipped settings: its results are as promised."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from craft_pipelines.demo import CONFIGS, PRESETS, demo

from craft_ray.config import load_config
from craft_ray.errors import ConfigError
from craft_ray.examples import digits
from craft_ray.run.folder import RunFolder
from tests.support.clusters import BIN

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]


def run_demo(*arguments: str | Path) -> str:
    """The output of `craft-ray demo`, which must succeed."""
    result = subprocess.run(
        [BIN / "craft-ray", "demo", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick demo, whose teacher and cache other tests reuse."""
    out = tmp_path_factory.mktemp("demo") / "digits"
    run_demo("--quick", "--out", out)
    return out


@pytest.mark.slow
def test_a_quick_demo_computes_nothing_again(quick: Path) -> None:
    printed = run_demo("--quick", "--out", quick)
    assert "no row computed" in printed
    assert "3 of 3 runs are finished already" in printed


@pytest.mark.slow
def test_the_digits_demo_keeps_its_promise_over_three_seeds(quick: Path) -> None:
    """It reuses the teacher and the cache of the quick demo, which has the same config for them."""
    out = quick
    printed = run_demo("--out", out)
    summary = json.loads((out / "result.json").read_text())["summary"]
    assert summary["baseline"]["old_ratio"] < 0.60
    assert summary["hidden"]["old_ratio"] >= 0.95
    assert summary["hidden"]["new_ratio"] >= 0.97
    assert summary["hidden"]["feasible"] == 3
    assert str(out / "report.html") in printed.splitlines()[-1]
    trials = pq.read_table(out / "sweep" / "trials.parquet").to_pylist()
    assert [trial["trial"] for trial in trials] == [0, 1, 2, 3]
    assert next(trial for trial in trials if trial["rank"] == 1)["feasible"]
    assert (out / "sweep" / "report.html").exists()
    again = run_demo("--out", out)
    assert "no row computed" in again
    assert "9 of 9 runs are finished already" in again
    assert "[1/4]" not in again, "no trial is run again"


@pytest.mark.slow
def test_the_benchmark_of_sweeps_reads_a_demo(quick: Path, tmp_path: Path) -> None:
    """The costs of a few trials are finite and not judged."""
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.sweep", "--tiny", "--demo", quick, "--json", path]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=400)
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4
    assert all(math.isfinite(row["value"]) and row["target"] is None for row in rows)


@pytest.mark.slow
def test_the_text_demo_keeps_more_than_plain_fine_tuning(tmp_path: Path) -> None:
    run_demo("--out", tmp_path, "--preset", "text", "--quick")
    summary = json.loads((tmp_path / "result.json").read_text())["summary"]
    assert summary["hidden"]["old_ratio"] > summary["baseline"]["old_ratio"] + 0.1


def test_a_finished_teacher_of_another_config_is_refused(tmp_path: Path) -> None:
    """As an earlier version of the demo leaves it."""
    for name in ("data", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "preset").write_text(digits.__name__)
    config = load_config(CONFIGS / "demo_digits_teacher.yaml", PRESETS["digits"].quick_teacher, base=tmp_path)
    folder = RunFolder(Path(config.output_dir) / config.name)
    folder.begin(config.changed({"train.learning_rate": 0.5}), ["test"])
    folder.write_result({})
    with pytest.raises(
        ConfigError, match=r"another config \(train\.learning_rate was 0\.5, is [^)]+\): choose another --out"
    ) as caught:
        demo(tmp_path, "digits", quick=True)
    assert "\n" not in caught.value.message


def test_a_folder_of_another_preset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "preset").write_text(digits.__name__)
    with pytest.raises(Exception, match="choose another --out"):
        demo(tmp_path, "text", quick=True)
