"""Runs on real Ray processes: several workers equal one, a killed worker, controller or driver costs only time."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from craft_pipelines.train import plan_run, resume_run, train_run
from safetensors.torch import load_file

from craft_ray.config import Experiment
from craft_ray.run.folder import RunFolder
from tests.support.commands import command, finish, one_line, saved, wait_until
from tests.support.experiments import Digits
from tests.support.runs import apart, measured, weights

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def run_folder(config: Experiment) -> RunFolder:
    return RunFolder(Path(config.output_dir) / f"{config.name}-{config.arm}-seed{config.seed}")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_two_workers_equal_one_on_the_same_global_batches(
    digits: Digits, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that prepares its batches itself equals two that have a loader each."""
    alone, shared = (
        digits.experiment(cached,
            {"name": f"w{workers}", "workers.num_workers": workers, "train.steps": 4, "output_dir": str(tmp_path),
             "train.loader_workers": workers // 2},
        )
        for workers in (0, 2)
    )  # fmt: skip
    train_run(plan_run(alone))
    assert "1 worker(s)" in capsys.readouterr().out
    code, out, err = finish(command("train", saved(shared, tmp_path)))
    assert code in (0, 3), err
    assert "2 worker(s)" in out
    one, two = measured(run_folder(alone)), measured(run_folder(shared))
    assert any(record["craft/conflict"] for record in one), "surgery must fire for this to mean anything"
    for a, b in zip(one, two, strict=True):
        assert a["craft/conflict"] == b["craft/conflict"]
        for key in ("train/loss", "train/grad_norm", "craft/retention_loss", "craft/lambda"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-6), key
    start = load_file(digits.model / "model.safetensors")
    assert apart(weights(run_folder(shared)), weights(run_folder(alone)), start) < 1e-3


def kill(process: subprocess.Popen[str], title: str, of: int = 1) -> None:
    """Kill a process of a run's cluster with this in its title, as the kernel does when memory runs out.

    Args:
        of: how many there are.
    """
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if any(title in c for c in p.cmdline())]
    assert len(found) == of
    found[-1].send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_runs_with_a_killed_worker_controller_or_driver_have_the_result_of_the_undisturbed_run(
    digits: Digits, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(name: str, workers: int) -> Experiment:
        changes = {
            "name": name, "workers.num_workers": workers, "output_dir": str(tmp_path),
            "train.steps": 120, "train.checkpoint_every": 10, "craft.retention_freq": 3,
        }  # fmt: skip
        return digits.experiment(cached, changes)

    undisturbed = planned("undisturbed", 0)
    train_run(plan_run(undisturbed))

    lost = planned("lost-worker", 1)
    process = command("train", saved(lost, tmp_path))
    wait_until(lambda: len(run_folder(lost).read_metrics()) >= 15)
    kill(process, "RayTrainWorker")
    code, out, err = finish(process)
    assert code in (0, 3), err
    assert "resuming after step" in out
    assert equal(weights(run_folder(lost)), weights(run_folder(undisturbed)))
    assert measured(run_folder(lost)) == measured(run_folder(undisturbed))

    headless = planned("lost-controller", 1)
    process = command("train", saved(headless, tmp_path))
    wait_until(lambda: len(run_folder(headless).read_metrics()) >= 15)
    kill(process, "TrainController")
    code, _, err = finish(process)
    assert code == 1
    assert "the process that controls the run was lost" in one_line(err)
    assert f"--resume {run_folder(headless).path}" in err
    train_run(resume_run(run_folder(headless).path, headless.changed({"workers.num_workers": 0})))
    assert "resuming after step" in capsys.readouterr().out
    assert equal(weights(run_folder(headless)), weights(run_folder(undisturbed)))
    assert measured(run_folder(headless)) == measured(run_folder(undisturbed))

    killed = planned("killed-driver", 0)
    process = command("train", saved(killed, tmp_path))
    wait_until(lambda: len(run_folder(killed).read_metrics()) >= 15)
    process.kill()
    process.communicate()
    assert run_folder(killed).finished() is None
    train_run(resume_run(run_folder(killed).path, killed))
    assert "resuming after step" in capsys.readouterr().out
    assert equal(weights(run_folder(killed)), weights(run_folder(undisturbed)))
    assert measured(run_folder(killed)) == measured(run_folder(undisturbed))


@pytest.mark.slow
def test_a_mistake_found_by_a_worker_is_one_line(digits: Digits, cached: Path, tmp_path: Path) -> None:
    """The worker that finds it ends the other, and the run is not restarted again and again."""
    import pyarrow.parquet as pq

    table = pq.read_table(digits.data / "new_train.parquet")
    images = table["image"].to_pylist()
    images[:] = [b"no image"] * len(images)
    broken = tmp_path / "broken.parquet"
    pq.write_table(table.set_column(table.column_names.index("image"), "image", [images]), broken)
    config = digits.experiment(cached,
        {"workers.num_workers": 2, "task.path": str(broken), "output_dir": str(tmp_path)},
    )  # fmt: skip
    code, _, err = finish(command("train", saved(config, tmp_path)))
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("craft-ray:")]
    assert len(lines) == 1, err
    assert "its image of 8 bytes does not decode" in lines[0]
    assert "Traceback" not in err


@pytest.mark.slow
def test_two_workers_that_share_a_vision_language_model_equal_one_and_survive_a_lost_worker(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    """A tower for images and one for text, each with blocks of its own. If one of the two workers is killed, both begin
    again at the last checkpoint that both had written, and end as the undisturbed ones do."""
    sharding = {"workers.num_workers": 2, "workers.sharding": "full"}
    alone, shared, lost = (
        digits.experiment(cached,
            {"name": name, "train.steps": 24, "train.checkpoint_every": 4, "output_dir": str(tmp_path), **changes},
        )
        for name, changes in {"alone": {}, "shared": sharding, "lost": sharding}.items()
    )  # fmt: skip
    train_run(plan_run(alone))
    code, _, err = finish(command("train", saved(shared, tmp_path)))
    assert code in (0, 3), err
    start = load_file(digits.model / "model.safetensors")
    assert apart(weights(run_folder(shared)), weights(run_folder(alone)), start) < 1e-3

    process = command("train", saved(lost, tmp_path))
    wait_until(lambda: len(run_folder(lost).read_metrics()) >= 6)
    kill(process, "RayTrainWorker", of=2)
    code, out, err = finish(process)
    assert code in (0, 3), err
    assert "resuming after step" in out
    assert equal(weights(run_folder(lost)), weights(run_folder(shared)))
    assert measured(run_folder(lost)) == measured(run_folder(shared))
