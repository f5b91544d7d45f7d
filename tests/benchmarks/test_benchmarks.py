"""Every benchmark runs at tiny sizes and reports finite numbers and the hardware that they were measured on."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.adapters import LORA
from benchmarks.harness import Ratio, Row, Timings, Variant, interleaved
from benchmarks.memory import peak_in_process
from benchmarks.syncs import host_syncs
from benchmarks.variants import SETTINGS
from craft_ray.config import AdapterConfig, CraftConfig

ROOT = Path(__file__).parents[2]


def run(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, "--tiny", "--json", str(path)])
    threads = torch.get_num_threads()
    try:
        importlib.import_module(f"benchmarks.{name}").main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text())


def check(report: dict[str, Any], name: str) -> None:
    assert report["benchmark"] == name
    assert report["commit"]
    assert report["clock"]
    assert report["hardware"]["threads"] == 1
    assert report["hardware"]["versions"]["torch"]
    assert report["rows"]
    for row in report["rows"]:
        assert math.isfinite(row["value"]), row
        assert row["unit"] in ("ratio", "percent", "copies", "waits")
        assert row["target"] is None  # tiny sizes are not judged
        if row["rounds"] is not None:
            assert row["lower"] <= row["value"] <= row["upper"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("cache_build", marks=pytest.mark.slow),
        "retention_modes",
        "anchor_fetch",
        "surgery",
        "adapters",
        "savers",
    ],
)
def test_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(run(name, tmp_path / "report.json", monkeypatch), name)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(run("ray_data", tmp_path / "report.json", monkeypatch), "ray_data")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["scaling_measured", "metrics_cost"])
def test_runs_on_ray(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(run(name, tmp_path / "report.json", monkeypatch), name)


def test_the_gpu_script_needs_neither_ray_nor_pydantic(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    program = (
        "import runpy, sys\n"
        "sys.modules.update(pydantic=None, ray=None)\n"
        f"sys.argv = ['gpu', '--tiny', '--json', {str(path)!r}]\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
    check(json.loads(path.read_text()), "gpu")


def test_settings_without_pydantic_are_a_config() -> None:
    keys = {key: value for key, value in vars(SETTINGS).items() if key != "lambda_start"}
    config = CraftConfig(**keys)
    assert keys.items() <= config.model_dump().items()
    assert SETTINGS.lambda_start == config.lambda_start
    assert {"kind": "lora", **vars(LORA)} == AdapterConfig(**vars(LORA)).model_dump()


@pytest.mark.slow
def test_step_runs_and_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run("step", tmp_path / "report.json", monkeypatch)
    check(report, "step")
    waits = {row["what"]: row["value"] for row in report["rows"] if row["unit"] == "waits"}
    assert waits["waits of craft_step"] == 0
    assert waits["waits of lists and .item()"] > 10


def test_ratios_are_of_the_same_round() -> None:
    """Twice as slow in every round, whatever the times of the rounds."""
    times = Timings({"a": [2.0, 20.0, 6.0], "b": [1.0, 10.0, 3.0], "c": [1.0, 10.0, 3.0]}, "a clock")
    assert times.ratio("a", "b") == Ratio(2.0, 2.0, 2.0, 3)
    assert times.ratio("a", ("b", "c")).median == 1.0


def test_every_round_starts_with_another_variant_and_is_prepared() -> None:
    calls: list[str] = []
    variants = {
        name: Variant(lambda name=name: calls.append(name), lambda name=name: calls.append(f"prepare {name}"))
        for name in "ab"
    }
    interleaved(variants, rounds=2)
    order = [call for call in calls if len(call) == 1]
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert calls[0::2] == [f"prepare {name}" for name in order]


def test_a_target_is_met_or_missed() -> None:
    assert Row("x", 2.0, target=">= 2").met
    assert not Row("x", 1.06, target="<= 1.05").met
    assert Row("x", 2.0).met is None
    assert Row("x", None, target=">= 2").met is None


def test_waits_are_counted() -> None:
    x = torch.tensor([1.0, -1.0])
    waits = host_syncs(lambda: (x.sum().item(), bool(x[0] > 0), x[x > 0], x.nonzero(), x + x))
    assert waits["_local_scalar_dense"] == 2
    assert waits["index"] == 1
    assert waits["nonzero"] == 1
    assert set(waits) == {"_local_scalar_dense", "index", "nonzero"}


def hold(mebibytes: int) -> None:
    torch.ones(mebibytes << 18)


@pytest.mark.slow
def test_peak_memory_is_that_of_the_function() -> None:
    few, many = (peak_in_process(hold, n) / 2**20 for n in (1, 201))
    assert many - few == pytest.approx(200, abs=40)
