"""Sweeps on real Ray: killed anywhere and resumed, failing, stopped early, on several workers. No trial is lost or run
twice, all resources of a trial are freed, and no sweep hangs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from craft_pipelines import cli
from craft_pipelines.anchors import build
from craft_pipelines.room import room
from craft_pipelines.session import capacity, join
from craft_pipelines.sweep.driver import plan_sweep, resume_sweep, search, sweep
from craft_pipelines.sweep.runs import RunTrial, on_trainer
from craft_pipelines.sweep.tracking import SweepTracking
from craft_pipelines.train import plan_run, train_run

from craft_ray.config import Experiment, dump_config, load_config
from craft_ray.errors import ConfigError, CraftError
from craft_ray.sweep.space import parse_space
from craft_ray.sweep.trials import SweepFolder, TrialFolder
from tests.support.experiments import Digits
from tests.support.sweeps import snapshot, untimed, validated

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
PATIENCE_S = 300
"""A busy machine takes ten times as long, and a sweep that hangs takes forever."""

Knobs = dict[str, Any]

RATE = "train.learning_rate"
DRAWN: Knobs = {RATE: {"loguniform": [5e-4, 4e-3]}}
GOOD, BAD, BROKEN = 4e-3, 1e-5, 1e30
FORGETFUL = 100
"""A bound on the violation that a small learning rate keeps, and a large one does not."""
UNBOUND: dict[str, Any] = {"objective.subject_to": {}}
PROCESS = ("ray::CraftTrial", "ray::ResourceTrainable")
"""Titles of a process that runs a trial: idle, and in a call, where it has the name of Tune's wrapper."""


def grid(*rates: float) -> Knobs:
    return {RATE: {"grid": list(rates)}}


@pytest.fixture(scope="module", autouse=True)
def own_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The sweeps of this process share a cluster that starts and stops with this module."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRAFT_RAY_CACHE", str(tmp_path_factory.mktemp("expanded")))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield
    ray.shutdown()


@pytest.fixture(scope="module")
def base(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A config of one worker with an anchor cache, validation data and an objective. No trial is stopped early."""
    folder = tmp_path_factory.mktemp("sweeps")
    objective = {"maximize": "new/ratio", "subject_to": {"heldout/violation": f"<= {FORGETFUL}"}}
    changes = {**validated(digits.data), "objective": objective, "sweep": {"samples": 1, "scheduler": "none"}}
    config = digits.experiment(folder, changes)
    build(config, say=lambda _: None)
    return config.changed({"workers.num_workers": 1})


@dataclass(frozen=True)
class Swept:
    """A sweep that has ended, what it said, and whether a trial was within the bounds."""

    folder: SweepFolder
    said: list[str]
    feasible: bool

    def trial(self, number: int) -> TrialFolder:
        return self.folder.trial(number)

    def statuses(self) -> list[str]:
        return [trial.outcome().status for trial in self.folder.trials()]

    def rates(self) -> list[float]:
        return [(trial.params() or {})[RATE] for trial in self.folder.trials()]


def swept(config: Experiment, knobs: Knobs, path: Path, changes: Mapping[str, Any] | None = None) -> Swept:
    """Sweep in this process."""
    folder, plan = plan_sweep(config.changed(changes or {}), parse_space(knobs, "space.yaml"), path)
    said: list[str] = []
    return Swept(folder, said, sweep(folder, plan, said.append))


@pytest.fixture(scope="module")
def plain(base: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Four undisturbed trials. Do not write into them."""
    assert base.craft.anchor_cache_dir is not None
    cache = Path(base.craft.anchor_cache_dir)
    before = snapshot(cache)
    done = swept(base, DRAWN, tmp_path_factory.mktemp("plain") / "sweep", {"sweep.samples": 4})
    assert snapshot(cache) == before, "nothing is written where the anchors are"
    assert done.statuses() == ["finished"] * 4
    return done


def written(folder: Path, config: Experiment, knobs: Knobs) -> tuple[Path, Path]:
    """A config and a space as files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(dump_config(config))
    (folder / "space.yaml").write_text(yaml.safe_dump(knobs))
    return folder / "run.yaml", folder / "space.yaml"


def command(*arguments: str | Path) -> subprocess.Popen[str]:
    """`craft-ray sweep` as a user runs it, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "craft_pipelines.cli", "sweep", *map(str, arguments)], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def here(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `craft-ray sweep`, run in this process on the cluster that the tests share."""
    monkeypatch.setattr(sys, "argv", ["craft-ray", "sweep", *map(str, arguments)])
    handler = signal.getsignal(signal.SIGINT)
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.signal(signal.SIGINT, handler)
    return 0


def one_line(err: str) -> str:
    """The one line of a mistake. The output of Ray's processes does not count."""
    lines = [line for line in err.splitlines() if line.startswith("craft-ray: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def below(process: psutil.Process, titles: tuple[str, ...] = ("",)) -> list[psutil.Process]:
    """The descendants of a process that have one of these titles."""
    found = []
    for child in process.children(recursive=True):
        try:
            if " ".join(child.cmdline()).startswith(titles):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def killing_the_process_of(trial: TrialFolder) -> Iterator[list[int]]:
    """Kill the process that runs a trial, once, when it has reported."""
    killed: list[int] = []

    def kill() -> None:
        wait_until(trial.reports)
        for process in below(psutil.Process(), PROCESS):
            process.kill()
            killed.append(process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield killed
    thread.join(timeout=5)


def table(folder: SweepFolder) -> list[dict[str, Any]]:
    return pq.read_table(folder.path / "trials.parquet").to_pylist()


def numbers(trial: TrialFolder) -> dict[str, tuple[int, int, int]]:
    """The files that a trial's training leaves, as far as they show that it was not trained again."""
    every = snapshot(trial.path)
    return {name: stat for name, stat in every.items() if name.endswith((".jsonl", ".json"))}


# --- one undisturbed sweep ----------------------------------------------------------------------------------------


def test_every_trial_is_a_row_and_none_holds_a_copy_of_the_anchors(plain: Swept) -> None:
    rows = table(plain.folder)
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    assert {row["status"] for row in rows} == {"finished"}
    assert [row[f"param:{RATE}"] for row in rows] == plain.rates()
    assert not list((plain.folder.path / "trials").rglob("*.parquet"))
    assert not plain.folder.scratch.exists()


def test_what_the_trials_note_is_said_once_and_leaves_no_file(plain: Swept) -> None:
    said = [line for line in plain.said if "of the new skill" in line]
    assert len(said) == 1, plain.said
    assert said[0].startswith("[trial ")
    assert "M trainable parameters" in said[0]
    assert not list(plain.folder.path.rglob("progress.jsonl"))


def test_a_setting_that_breaks_the_bound_does_not_win_by_its_metric(plain: Swept) -> None:
    rows = {row["rank"]: row for row in table(plain.folder)}
    assert rows[1]["feasible"]
    better = [row for row in rows.values() if not row["feasible"]]
    assert better, "a setting must break the bound for this to mean anything"
    assert all(row["value"] > rows[1]["value"] for row in better)
    assert plain.feasible
    assert f"best: trial {rows[1]['trial']}" in "\n".join(plain.said)


def test_the_best_config_trains_to_the_numbers_of_its_trial(plain: Swept, tmp_path: Path) -> None:
    """Training is in Ray Train's local mode, beside Ray Tune in one process."""
    best = next(row["trial"] for row in table(plain.folder) if row["rank"] == 1)
    config = load_config(plain.folder.path / "best.yaml")
    config = config.changed({"output_dir": str(tmp_path), "workers.num_workers": 0})
    train_run(plan_run(config))
    again = tmp_path / config.run_name / "validation.jsonl"
    assert again.read_text() == (plain.trial(best).path / "seed0" / "validation.jsonl").read_text()


@pytest.mark.parametrize(
    "run_trial",
    [
        pytest.param(None, id="in the trial's process"),
        pytest.param(on_trainer, id="in Ray Train's local mode", marks=pytest.mark.slow),
    ],
)
def test_a_sweep_without_workers_has_the_same_results(
    run_trial: RunTrial | None, base: Experiment, plain: Swept, tmp_path: Path
) -> None:
    changes = {"workers.num_workers": 0, "sweep.samples": 1}
    folder, plan = plan_sweep(base.changed(changes), parse_space(DRAWN, "space.yaml"), tmp_path / "sweep")
    search(folder, plan, SweepTracking(folder, plan, print), run_trial=run_trial)
    assert folder.trial(0).outcome().status == "finished"
    assert untimed(folder.trial(0).reports()) == untimed(plain.trial(0).reports())


# --- early stopping, schedulers, samplers -------------------------------------------------------------------------


@pytest.mark.slow
def test_asha_stops_what_is_clearly_worse_before_its_second_seed(base: Experiment, tmp_path: Path) -> None:
    changes = {**UNBOUND, "sweep": {"samples": 1, "scheduler": "asha", "repeat": 2, "parallel": 1}}
    done = swept(base, grid(GOOD, BAD), tmp_path / "sweep", changes)
    assert done.statuses() == ["finished", "stopped"]
    rows = table(done.folder)
    assert [row["steps"] for row in rows] == [12, 2]
    assert [row["rank"] for row in rows] == [1, None]
    good, bad = done.trial(0), done.trial(1)
    assert [good.run(seed).finished() is not None for seed in (0, 1)] == [True, True]
    assert bad.run(0).finished() is None
    assert not bad.run(1).started
    assert len(bad.run(0).read_metrics()) == 2


def test_no_trial_within_the_bounds_is_exit_code_3(
    base: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = base.changed({"objective.subject_to": {"old/ratio": ">= 1000"}})
    run, space = written(tmp_path, config, DRAWN)
    assert here(monkeypatch, run, "--space", space, "--out", tmp_path / "sweep") == 3
    assert "NO trial is within the bounds" in capsys.readouterr().out
    assert "NOT kept" in (tmp_path / "sweep" / "best.yaml").read_text()


@pytest.mark.slow
def test_the_median_rule_stops_what_is_worse_than_most(base: Experiment, tmp_path: Path) -> None:
    changes = {**UNBOUND, "sweep": {"samples": 1, "scheduler": "median", "parallel": 1}}
    done = swept(base, grid(2e-3, 1.5e-3, 1e-3, BAD), tmp_path / "sweep", changes)
    assert done.statuses()[0] == "finished"
    assert done.statuses()[3] == "stopped"


@pytest.mark.slow
def test_population_based_training_continues_from_a_better_trials_weights(base: Experiment, tmp_path: Path) -> None:
    knobs: Knobs = {RATE: {"loguniform": [1e-5, 4e-3]}}
    # More trials than processors: they take turns.
    cpus = os.cpu_count() or 1
    changes = {**UNBOUND, "train.steps": 10, "sweep": {"samples": cpus + 1, "scheduler": "pbt"}}
    done = swept(base, knobs, tmp_path / "sweep", changes)
    assert done.statuses() == ["finished"] * (cpus + 1)
    at_validations = [[report["params"][RATE] for report in trial.reports()] for trial in done.folder.trials()]
    assert any(len(set(rates)) > 1 for rates in at_validations), at_validations
    for trial in done.folder.trials():
        assert [report["step"] for report in trial.reports()] == [2, 4, 6, 8, 10]
        assert (trial.run(0).checkpoints / "last" / "model").is_dir()


@pytest.mark.slow
def test_tpe_draws_the_same_for_a_seed_and_resumes_where_it_was_stopped(base: Experiment, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    changes = {"sweep": {"samples": 4, "sampler": "tpe", "scheduler": "none", "parallel": 1}}
    first, second = (swept(base, DRAWN, tmp_path / name, changes) for name in ("first", "second"))
    assert len(set(first.rates())) == 4
    assert all(5e-4 <= rate <= 4e-3 for rate in first.rates())
    assert first.rates() == second.rates()

    for number in (2, 3):
        shutil.rmtree(second.trial(number).path)
    kept = [numbers(second.trial(number)) for number in (0, 1)]
    sweep(*resume_sweep(second.folder.path, None, None, None), say=lambda _: None)
    assert [numbers(second.trial(number)) for number in (0, 1)] == kept
    assert second.statuses() == ["finished"] * 4
    assert second.rates()[:2] == first.rates()[:2]
    assert len(set(second.rates())) == 4
    assert all(5e-4 <= rate <= 4e-3 for rate in second.rates())


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_that_fails_again_and_again_is_marked_with_its_reason(base: Experiment, tmp_path: Path) -> None:
    changes = {"sweep": {"samples": 1, "scheduler": "none", "max_failures": 2, "parallel": 1}}
    done = swept(base, grid(2e-3, BROKEN, 1e-3), tmp_path / "sweep", changes)
    assert done.statuses() == ["finished", "failed", "finished"]
    assert sum("trial 1: " in line and "it is tried again" in line for line in done.said) == 2
    row = table(done.folder)[1]
    assert row["status"] == "failed"
    assert row["rank"] is None
    assert "nan" in row["reason"].lower()
    assert "Traceback" not in row["reason"]
    assert any(line.startswith("2 trials finished, 0 stopped early, 1 failed") for line in done.said)


@pytest.mark.slow
def test_a_sweep_whose_trials_all_fail_is_one_line(
    base: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run, space = written(tmp_path, base.changed({"sweep.max_failures": 0}), grid(BROKEN))
    assert here(monkeypatch, run, "--space", space, "--out", tmp_path / "sweep") == 1
    assert "no trial of the sweep" in one_line(capfd.readouterr().err)
    assert [row["status"] for row in table(SweepFolder(tmp_path / "sweep"))] == ["failed"]


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_has_the_same_results(base: Experiment, plain: Swept, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    with killing_the_process_of(folder.trial(0)) as killed:
        done = swept(base, DRAWN, folder.path, {"sweep.samples": 2, "sweep.parallel": 1})
    assert killed
    assert any("it is tried again" in line for line in done.said)
    assert done.statuses() == ["finished", "finished"]
    for number in (0, 1):
        assert untimed(done.trial(number).reports()) == untimed(plain.trial(number).reports())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers.cpus_per_worker": 1e6}, "a trial takes 1 worker(s) of 1e+06 CPU, and the cluster holds 0 of them"),
        ({"workers.use_gpu": True}, "a trial takes 1 worker(s) of 1 CPU, 1 GPU"),
        ({"workers.resources_per_worker": {"quantum": 1}}, "1 quantum"),
    ],
)
def test_a_worker_that_the_cluster_cannot_hold_is_refused_before_any_trial(
    changes: dict[str, Any], words: str, base: Experiment, tmp_path: Path
) -> None:
    if "workers.use_gpu" in changes and torch.cuda.is_available():
        pytest.skip("this machine has a graphics processor")
    with pytest.raises(ConfigError) as refused:
        swept(base, DRAWN, tmp_path / "sweep", changes)
    assert words in refused.value.message
    assert "\n" not in refused.value.message
    assert not SweepFolder(tmp_path / "sweep").trials()


# --- interruption -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_is_resumed_as_it_was_started_or_with_more_samples(
    base: Experiment, plain: Swept, tmp_path: Path
) -> None:
    path = tmp_path / "sweep"
    shutil.copytree(plain.folder.path, path)
    config, space = base.changed({"sweep.samples": 4}), parse_space(DRAWN, "space.yaml")
    with pytest.raises(ConfigError, match=r"was started with another config \(train.steps was 6, is 8\)"):
        resume_sweep(path, config.changed({"train.steps": 8}), None, None)
    with pytest.raises(ConfigError, match="was started with the space space"):
        resume_sweep(path, config, parse_space(grid(GOOD), "space.yaml"), None)
    with pytest.raises(ConfigError, match="was started with 4 samples: --samples may only add"):
        resume_sweep(path, config, space, 3)
    with pytest.raises(ConfigError, match="that it was started with: only tracking"):
        resume_sweep(path, changes={"craft.lambda_lr": 0.5})
    assert resume_sweep(path, changes={"sweep.parallel": 1})[1].config.sweep.parallel == 1
    resume_sweep(path, changes={"sweep.parallel": None})

    before = [numbers(trial) for trial in SweepFolder(path).trials()]
    said: list[str] = []
    sweep(*resume_sweep(path, None, None, 5), say=said.append)
    after = SweepFolder(path).trials()
    assert [numbers(trial) for trial in after][:4] == before, "trials that have ended are not touched"
    assert [trial.params() for trial in after][:4] == [trial.params() for trial in plain.folder.trials()]
    assert [row["trial"] for row in table(SweepFolder(path))] == [0, 1, 2, 3, 4]
    assert sum("finished after" in line for line in said) == 1


@pytest.mark.slow
def test_an_interrupted_sweep_says_how_to_resume_it_and_resumes(base: Experiment, plain: Swept, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    run, space = written(tmp_path, base.changed({"sweep.samples": 4}), DRAWN)
    process = command(run, "--space", space, "--out", folder.path)
    wait_until(lambda: any(trial.reports() for trial in folder.trials()))
    with pytest.raises(ConfigError) as refused:
        sweep(*resume_sweep(folder.path, None, None, None))
    assert "another process is running the sweep" in refused.value.message
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert f"--resume {folder.path}" in one_line(err)

    kept = {trial.number: numbers(trial) for trial in folder.trials() if trial.outcome().status == "finished"}
    sweep(*resume_sweep(folder.path, changes={"sweep.parallel": 1}), say=lambda _: None)  # each process takes seconds
    assert {number: numbers(folder.trial(number)) for number in kept} == kept
    for trial in plain.folder.trials():
        assert untimed(folder.trial(trial.number).reports()) == untimed(trial.reports())


@dataclass(frozen=True)
class Killed:
    """A sweep that was killed several times, and the numbers of ended trials after each time and at the end."""

    folder: SweepFolder
    ended: list[dict[int, dict[str, tuple[int, int, int]]]]
    code: int
    out: str
    tracker: str


@pytest.fixture(scope="module")
def killed(base: Experiment, plain: Swept, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """After its first report, in the middle, and when all trials had ended but no results were written."""
    home = tmp_path_factory.mktemp("killed")
    folder, tracker = SweepFolder(home / "sweep"), f"sqlite:///{home / 'runs.db'}"
    changes = {"sweep": {"samples": 6, "scheduler": "asha"}, "tracking.mlflow": tracker}
    run, space = written(home, base.changed(changes), DRAWN)

    def over() -> dict[int, dict[str, tuple[int, int, int]]]:
        return {trial.number: numbers(trial) for trial in folder.trials() if trial.outcome().status != "open"}

    moments: list[Callable[[], object]] = [
        lambda: any(trial.reports() for trial in folder.trials()),
        lambda: len(over()) >= 3,
        lambda: len(over()) == 6,
    ]
    ended: list[dict[int, dict[str, tuple[int, int, int]]]] = []
    arguments: tuple[str | Path, ...] = (run, "--space", space, "--out", folder.path)
    for moment in moments:
        process = command(*arguments)
        wait_until(lambda: moment() or process.poll() is not None)  # noqa: B023 - used within this iteration
        assert process.poll() is None, process.communicate()
        processes = below(psutil.Process(process.pid))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (folder.path / "trials.parquet").exists()
        _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
        assert not alive, "the processes of a killed sweep end by themselves"
        ended.append(over())
        arguments = ("--resume", folder.path)
    last = command(*arguments)
    out, err = last.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in err
    ended.append(over())
    return Killed(folder, ended, last.returncode, out, tracker)


@pytest.mark.cluster
def test_a_killed_sweep_loses_no_trial_and_trains_none_that_has_ended_again(killed: Killed, plain: Swept) -> None:
    assert killed.code == 0
    assert [row["trial"] for row in table(killed.folder)] == [0, 1, 2, 3, 4, 5]
    assert [len(ended) for ended in killed.ended][2:] == [6, 6]
    for earlier, later in zip(killed.ended, killed.ended[1:], strict=False):
        assert {number: later[number] for number in earlier} == earlier
    compared = 0
    for trial in plain.folder.trials():
        ours = killed.folder.trial(trial.number)
        assert ours.params() == trial.params()
        found = untimed(ours.reports())
        assert found == untimed(trial.reports())[: len(found)]
        compared += ours.outcome().status == "finished"
    assert compared, "a trial must be finished in both for this to mean anything"


@pytest.mark.cluster
def test_a_killed_sweep_has_one_tracked_run_for_each_trial(killed: Killed) -> None:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tracking_uri=killed.tracker, registry_uri=killed.tracker)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert len(parents) == 1
    assert len(children) == len(runs) - 1 == 6
    assert parents[0].info.status == "FINISHED"
    for trial in killed.folder.trials():
        run = children[f"digits-trial{trial.number}"]
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.tags["craft.status"] == trial.outcome().status
        assert float(run.data.params[RATE]) == (trial.params() or {})[RATE]
        history = client.get_metric_history(run.info.run_id, "new/ratio")
        assert [(entry.step, entry.value) for entry in history] == [
            (report["step"], report["metrics"]["new/ratio"]) for report in trial.reports()
        ]


# --- several workers ----------------------------------------------------------------------------------------------


def halves(base: Experiment) -> Experiment:
    """Two workers that take all processors of this machine."""
    cpus = ray.cluster_resources()["CPU"]
    return base.changed({"workers.num_workers": 2, "workers.cpus_per_worker": cpus / 2})


OF_THE_CLUSTER = {"_AutoscalingCoordinatorActor"}
"""Actors that Ray Train starts once per cluster; they take no resources."""


def alive() -> set[str]:
    """The classes of the actors of our cluster."""
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    return {actor.class_name for actor in list_actors(address=address, filters=[("state", "=", "ALIVE")], limit=1000)}


def held() -> list[str]:
    """What is in use on the cluster: CPUs, placement groups, actors."""
    taken = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)
    groups = [group["state"] for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    return [f"{taken:g} CPU"] * bool(taken) + groups + sorted(alive() - OF_THE_CLUSTER)


@pytest.fixture(scope="module")
def two_workers(base: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Swept, list[int]]:
    """Three trials of two workers each, all meant to run at once. The first is killed, the second is stopped early."""
    join(dashboard=True)
    config = halves(base).changed({**UNBOUND, "sweep": {"samples": 1, "scheduler": "asha", "parallel": 50}})
    folder = SweepFolder(tmp_path_factory.mktemp("workers") / "sweep")
    with killing_the_process_of(folder.trial(0)) as victims:
        done = swept(config, grid(GOOD, BAD, 3.9e-3), folder.path)
    return done, victims


@pytest.mark.cluster
def test_trials_of_several_workers_end_though_one_is_killed_one_is_stopped_and_all_want_to_run_at_once(
    two_workers: tuple[Swept, list[int]],
) -> None:
    done, victims = two_workers
    assert victims
    assert sum("trial 0: its process was lost" in line for line in done.said) == 1
    assert done.statuses()[:2] == ["finished", "stopped"]
    assert [report["step"] for report in done.trial(0).reports()] == [2, 4, 6]
    assert [report["step"] for report in done.trial(1).reports()] == [2]


@pytest.mark.cluster
def test_resources_of_trials_of_several_workers_are_freed(two_workers: tuple[Swept, list[int]]) -> None:
    for _ in range(PATIENCE_S):
        if not held():
            break
        time.sleep(1)
    assert held() == []


@pytest.mark.cluster
def test_more_workers_than_the_cluster_holds_are_refused_before_any_trial(base: Experiment, tmp_path: Path) -> None:
    join(dashboard=True)
    workers = int(ray.cluster_resources()["CPU"]) + 1
    sizes = {"train.batch_size": workers, "craft.anchor_batch_size": workers}
    with pytest.raises(ConfigError, match=rf"a trial takes {workers} worker\(s\) of 1 CPU, and the cluster holds"):
        swept(base, DRAWN, tmp_path / "sweep", {"workers.num_workers": workers, **sizes})
    assert not SweepFolder(tmp_path / "sweep").trials()
    assert concurrent(halves(base).changed({"sweep.parallel": 50})) == 1


def concurrent(config: Experiment) -> int:
    return room(config, "trial", config.sweep.parallel).count


def listening(port: int) -> set[str]:
    """The addresses at which descendants of this process listen on a port."""
    found = set()
    for process in below(psutil.Process()):
        try:
            sockets = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        found |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.port == port}
    return found


@pytest.mark.cluster
def test_a_cluster_has_a_dashboard_where_it_is_needed_on_the_loopback_interface_alone() -> None:
    ray.shutdown()
    join()
    assert not ray._private.worker._global_node.webui_url
    with pytest.raises(Exception, match=r"(?i)dashboard|api server"):
        alive()
    join(dashboard=True)
    assert alive() == set()
    port = int(ray._private.worker._global_node.webui_url.rpartition(":")[2])
    assert listening(port) == {"127.0.0.1"}
    session = ray.get_runtime_context().get_job_id(), ray.get_runtime_context().gcs_address
    join()
    join(dashboard=True)
    assert (ray.get_runtime_context().get_job_id(), ray.get_runtime_context().gcs_address) == session


@ray.remote(num_cpus=0)
class Inquirer:
    """Lists the actors of its cluster, as the process that watches the workers of Ray Train does."""

    def actors(self) -> list[str]:
        from ray.util.state import list_actors

        return [actor.actor_id for actor in list_actors()]

    def own(self) -> str:
        return str(ray.get_runtime_context().get_actor_id())


@pytest.mark.slow
def test_a_second_cluster_on_the_machine_is_not_mistaken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as shared:  # a short path, for sockets below it
        monkeypatch.setenv("RAY_TMPDIR", shared)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        join(dashboard=True)
        assert "RAY_ADDRESS" not in os.environ
        other = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", f"--port={port}", "--include-dashboard=true",
             "--dashboard-port=0", "--num-cpus=1", "--block"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            newest = Path(shared) / "ray" / "ray_current_cluster"
            wait_until(newest.exists)
            assert newest.read_text().endswith(f":{port}")
            inquirer = Inquirer.remote()
            assert ray.get(inquirer.own.remote()) in ray.get(inquirer.actors.remote(), timeout=PATIENCE_S)
        finally:
            started = below(psutil.Process(other.pid))
            other.terminate()
            other.wait(timeout=PATIENCE_S)
            for process in psutil.wait_procs(started, timeout=20)[1]:
                process.kill()
            ray.shutdown()


@pytest.mark.slow
def test_a_worker_does_not_fit_where_only_the_nodes_together_have_room(
    base: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        join(dashboard=True)
        assert ray.cluster_resources()["CPU"] == 2
        assert capacity({"CPU": 1.0}) == 2
        assert capacity({"CPU": 2.0}) == 0
        assert concurrent(base.changed({"workers.num_workers": 2})) == 1
        with pytest.raises(CraftError, match="a trial takes 1 worker"):
            concurrent(base.changed({"workers.cpus_per_worker": 2}))
        # GPUs in parts: nothing is computed on them here.
        sharing = {"workers.cpus_per_worker": 0.1, "workers.use_gpu": True}
        for share, trials in ((0.25, 4), (0.3, 3), (1, 1)):
            shared = base.changed({**sharing, "workers.resources_per_worker": {"GPU": share}})
            assert concurrent(shared) == trials
        with pytest.raises(CraftError, match=r"a trial takes 2 worker\(s\) of 0.1 CPU, 0.6 GPU"):
            concurrent(
                base.changed({**sharing, "workers.num_workers": 2, "workers.resources_per_worker": {"GPU": 0.6}})
            )
    finally:
        ray.shutdown()
        cluster.shutdown()
