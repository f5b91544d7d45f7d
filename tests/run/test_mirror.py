"""Caches, runs and sweeps in an object store: the same numbers as on a disk, and never anything incomplete."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from craft_pipelines.anchors import build, verify
from craft_pipelines.evaluate import evaluate
from craft_pipelines.sweep.driver import plan_sweep, resume_sweep, sweep
from craft_pipelines.train import plan_run, train_run
from safetensors.numpy import load

from craft_ray.anchors.manifest import read_manifest
from craft_ray.config import Experiment
from craft_ray.errors import CacheRefused, ConfigError
from craft_ray.report.html import write_report
from craft_ray.run import mirror
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import Record
from craft_ray.run.mirror import RunMirror, mirrored_folder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train
from craft_ray.storage.files import new_folder, write_atomically
from craft_ray.storage.last import last_checkpoint
from craft_ray.storage.paths import ObjectPath, StoragePath, copy_tree
from craft_ray.sweep.space import parse_space
from craft_ray.sweep.trials import SweepFolder
from craft_ray.workers import OneWorker
from tests.support.commands import command, finish, saved, wait_until
from tests.support.experiments import Digits
from tests.support.runs import measured
from tests.support.sweeps import validated


@pytest.fixture
def bucket(object_store: ObjectPath, tmp_path: Path) -> ObjectPath:
    """A folder of this test only."""
    return object_store / tmp_path.name


@pytest.fixture(scope="module")
def stored(object_store: ObjectPath, digits: Digits) -> ObjectPath:
    """The model, the data and a cache of them, all in the store. Read only."""
    folder = object_store / "stored"
    copy_tree(digits.model, folder / "model")
    copy_tree(digits.data, folder / "data")
    build(in_store(folder, digits), say=lambda _: None)
    return folder


def in_store(stored: ObjectPath, digits: Digits) -> Experiment:
    """The experiment of `Digits.experiment` with all paths in the store."""
    paths = {
        "model.path": f"{stored}/model",
        "task.path": f"{stored}/data/new_train.parquet",
        "anchors.source.path": f"{stored}/data/anchors.parquet",
        "craft.anchor_cache_dir": f"{stored}/anchors",
        "output_dir": f"{stored}/runs",
    }
    return digits.experiment(Path("/nowhere"), paths)


@pytest.fixture(scope="module")
def on_disk(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The same experiment with its cache, on the disk."""
    config = digits.experiment(tmp_path_factory.mktemp("disk"))
    build(config, say=lambda _: None)
    return config


def started(config: Experiment, path: StoragePath) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(config, ["test"])
    return folder


def trained(config: Experiment, path: StoragePath) -> RunFolder:
    folder = started(config, path)
    resume(config, folder)
    return folder


def resume(config: Experiment, folder: RunFolder) -> None:
    with mirrored_folder(folder) as mirror:
        train(config, mirror, OneWorker(), NullObserver())


def weights(folder: RunFolder) -> dict[str, bytes]:
    last = last_checkpoint(folder.checkpoints)
    assert last is not None
    return {name: array.tobytes() for name, array in load((last / "model" / "model.safetensors").read_bytes()).items()}


def test_a_cache_is_the_same_in_both(stored: ObjectPath, on_disk: Experiment, digits: Digits) -> None:
    assert on_disk.craft.anchor_cache_dir is not None
    assert read_manifest(stored / "anchors") == read_manifest(Path(on_disk.craft.anchor_cache_dir))
    config = in_store(stored, digits)
    said: list[str] = []
    assert build(config, said.append).rows_computed == 0
    verify(stored / "anchors", config, 8, said.append)
    assert "the model reproduces 8 anchors" in said[-1]


def test_a_cache_without_its_manifest_or_a_part_of_a_shard_is_refused(
    stored: ObjectPath, bucket: ObjectPath, digits: Digits
) -> None:
    config = in_store(stored, digits).changed({"craft.anchor_cache_dir": f"{bucket}/anchors"})
    copy_tree(stored / "anchors", bucket / "anchors")
    (bucket / "anchors" / "manifest.json").unlink()
    with pytest.raises(CacheRefused, match="is half-written"):
        trained(config, bucket / "run")
    assert build(config, lambda _: None).rows_computed == 0, "all shards are there"
    shard = bucket / "anchors" / "shards" / "shard-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CacheRefused, match=f"{shard} has {len(whole) - 1} bytes, the manifest says {len(whole)}"):
        trained(config, bucket / "run")
    shard.write_bytes(whole[:-1] + b"x")
    with pytest.raises(CacheRefused, match=r"shard-00001.parquet is damaged"):
        trained(config, bucket / "run")
    shard.unlink()
    assert build(config, lambda _: None).rows_computed == 16
    assert read_manifest(bucket / "anchors") == read_manifest(stored / "anchors")


def test_a_run_is_the_same_in_both(
    stored: ObjectPath, bucket: ObjectPath, on_disk: Experiment, digits: Digits, tmp_path: Path
) -> None:
    here = trained(on_disk.changed(digits.scored()), tmp_path / "run")
    data = {f"evaluation.{skill}.data.path": f"{stored}/data/{skill}_test.parquet" for skill in ("old", "new")}
    config = in_store(stored, digits).changed(digits.scored()).changed(data)
    there = trained(config, bucket / "run")
    assert measured(there) == measured(here)
    assert weights(there) == weights(here)
    ours, theirs = there.finished(), here.finished()
    assert ours is not None
    assert theirs is not None
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    assert there.read_predictions("old_after") == here.read_predictions("old_after")
    names = {entry.name for entry in (bucket / "run").iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "result.json", "checkpoints"} <= names
    assert not {".lock"} & names
    write_report([there], bucket / "report", title="test", command="test")
    assert "<html" in (bucket / "report" / "report.html").read_text()
    done = evaluate(config, [bucket / "run"], bucket / "scores.json", say=lambda _: None)
    assert done[1].scores["old"].value == ours["old"]["after"]
    assert (bucket / "scores.jsonl").exists()


def test_a_run_that_was_lost_resumes_from_its_last_complete_checkpoint(
    stored: ObjectPath, bucket: ObjectPath, on_disk: Experiment, digits: Digits, tmp_path: Path
) -> None:
    here = trained(on_disk, tmp_path / "run")
    config = in_store(stored, digits)
    folder = started(config, bucket / "run")
    with mirrored_folder(folder) as mirror:
        Run(config, mirror, OneWorker(), NullObserver()).loop(until=5)
    assert len(folder.read_metrics()) == 5
    # A process that was killed while it pushed a checkpoint leaves files of it, and the pointer to the previous one.
    (bucket / "run" / "checkpoints" / "step_000005" / "model" / "config.json").write_bytes(b"{")
    assert last_checkpoint(folder.checkpoints) == bucket / "run" / "checkpoints" / "step_000004"
    resume(config, folder)
    assert measured(folder) == measured(here)
    assert weights(folder) == weights(here)


def test_a_pointer_follows_its_checkpoint_and_the_result_everything(
    stored: ObjectPath, bucket: ObjectPath, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content of the store is complete at each moment."""
    config = in_store(stored, digits).changed(digits.scored())
    folder = started(config, bucket / "run")
    upload, write = ObjectPath.upload, ObjectPath.write_bytes

    def check_complete() -> None:
        last = last_checkpoint(folder.checkpoints)
        if last is not None:
            weights(folder)
            assert (last / "training_state" / "state.pt").exists()
            assert len(folder.read_metrics()) >= int(last.name.removeprefix("step_"))
        if folder.finished() is not None:
            assert last is not None
            assert last.name == "step_000006"
            assert len(folder.read_predictions("new_after")) == 24

    def uploaded(self: ObjectPath, source: Path) -> None:
        upload(self, source)
        check_complete()

    def written(self: ObjectPath, data: bytes) -> None:
        write(self, data)
        check_complete()

    monkeypatch.setattr(ObjectPath, "upload", uploaded)
    monkeypatch.setattr(ObjectPath, "write_bytes", written)
    resume(config, folder)
    assert folder.finished() is not None


def test_nothing_is_pushed_while_a_folder_is_fetched(bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is half fetched would replace what is whole."""
    write_atomically(bucket / "run" / "env.json", "{}")
    folder = RunFolder(bucket / "run")
    held: list[bool] = []
    with mirrored_folder(folder) as copy:
        assert isinstance(copy, RunMirror)

        def fetched(source: StoragePath, target: StoragePath) -> None:
            held.append(copy._pushing.locked())
            copy_tree(source, target)

        monkeypatch.setattr(mirror, "copy_tree", fetched)
        copy.pull()
    assert held == [True]


def test_what_is_half_written_is_not_pushed(bucket: ObjectPath) -> None:
    with mirrored_folder(RunFolder(bucket / "run")) as copy, new_folder(copy.disk / "model") as temporary:
        (temporary / "weights").write_text("half")
        copy.push()
        assert not list(bucket.listing())
        (temporary / "weights").write_text("whole")
    assert (bucket / "run" / "model" / "weights").read_text() == "whole"
    assert [info.base_name for info in bucket.listing() if info.is_file] == ["weights"]


def test_a_run_that_is_finished_is_not_started_again(stored: ObjectPath, bucket: ObjectPath, digits: Digits) -> None:
    config = in_store(stored, digits).changed({"output_dir": str(bucket), "train.steps": 2})
    run = plan_run(config)
    train_run(run)
    with pytest.raises(ConfigError, match=f"the run {bucket}/.* is finished"):
        plan_run(config)


@pytest.mark.ray
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_workers_of_ray_build_and_train_in_the_store_and_survive_a_kill(
    stored: ObjectPath, bucket: ObjectPath, on_disk: Experiment, digits: Digits, tmp_path: Path
) -> None:
    long = {"train.steps": 60, "train.checkpoint_every": 10}
    here = trained(on_disk.changed(long), tmp_path / "run")
    changes = {
        "name": "lost", "output_dir": str(bucket), "craft.anchor_cache_dir": f"{bucket}/anchors",
        "anchors.actors": 2, "workers.num_workers": 1, **long,
    }  # fmt: skip
    config = in_store(stored, digits).changed(changes)
    code, _, err = finish(command("anchors", "build", saved(config, tmp_path)))
    assert code == 0, err
    assert read_manifest(bucket / "anchors").content == read_manifest(stored / "anchors").content

    folder = RunFolder(bucket / "lost-hidden-seed0")
    process = command("train", saved(config, tmp_path))
    wait_until(lambda: last_checkpoint(folder.checkpoints) is not None)
    (worker,) = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("RayTrainWorker" in part for part in child.cmdline())
    ]
    worker.send_signal(signal.SIGKILL)
    code, out, err = finish(process)
    assert code in (0, 3), err
    assert "Step 60/60" in out, "the command follows what its worker writes into the store"
    assert "resuming after step" in out
    assert measured(folder) == measured(here)
    assert weights(folder) == weights(here)


@pytest.mark.ray
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_sweep_is_the_same_in_both(
    stored: ObjectPath, bucket: ObjectPath, on_disk: Experiment, digits: Digits, tmp_path: Path
) -> None:
    space = parse_space({"train.learning_rate": {"loguniform": [5e-4, 4e-3]}}, "space.yaml")
    changes = {
        **validated(digits.data),
        "objective.subject_to": {},
        "sweep": {"samples": 3, "scheduler": "none", "parallel": 1},
    }

    def swept(config: Experiment, path: StoragePath) -> SweepFolder:
        folder, plan = plan_sweep(config.changed({**changes, "workers.num_workers": 1}), space, path)
        assert sweep(folder, plan, say=lambda _: None)
        return folder

    def reports(folder: SweepFolder) -> list[list[Record]]:
        timed = ("seconds", "metrics")
        return [[{k: v for k, v in r.items() if k not in timed} for r in t.reports()] for t in folder.trials()]

    here = swept(on_disk, tmp_path / "sweep")
    there = swept(in_store(stored, digits), bucket / "sweep")
    assert reports(there) == reports(here)
    assert [trial.outcome().status for trial in there.trials()] == ["finished"] * 3
    names = {entry.name for entry in (bucket / "sweep").iterdir()}
    assert {"sweep.yaml", "trials.parquet", "best.yaml", "report.html", "trials"} <= names
    assert not names & {".lock", ".ray"}

    before = {info.path: info.mtime for info in (bucket / "sweep" / "trials").listing() if info.is_file}
    folder, plan = resume_sweep(bucket / "sweep", samples=4)
    sweep(folder, plan, say=lambda _: None)
    assert [trial.outcome().status for trial in folder.trials()] == ["finished"] * 4
    after = {info.path: info.mtime for info in (bucket / "sweep" / "trials").listing() if info.is_file}
    assert before.items() <= after.items(), "finished trials were not run again"
