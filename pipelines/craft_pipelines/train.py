"""Training runs on Ray Train: one trainer starts the workers, which train one or several runs to the end.

A lost worker is replaced and finds the last checkpoint in the run folder, so a run needs nothing from Ray but its
processes. `num_workers: 0` is Ray Train's local mode: the same function in this process, without a cluster.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from craft_pipelines.console import ConsoleObserver, FileObserver, following, line
from craft_pipelines.failures import LOST_PROCESS_ERRORS
from craft_pipelines.outputs import check_kept
from craft_pipelines.process_group import ProcessGroupConfig
from craft_pipelines.ray_metrics import RayMetrics
from craft_pipelines.session import check_resources, join, may_have_dashboard, quiet_ray
from craft_pipelines.stop_signal import StopSignal
from craft_pipelines.storage_check import check_shared
from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.matching import select
from craft_ray.anchors.reader import check_shards, check_sizes
from craft_ray.config import Experiment, WorkersConfig, dump_config, parse_config, read_yaml
from craft_ray.errors import ConfigError, CraftError, Interrupted, StorageError, first_line
from craft_ray.quiet import quiet_libraries
from craft_ray.run.checkpoint import checkpoint_step
from craft_ray.run.folder import RunFolder, command_line
from craft_ray.run.identity import check_config
from craft_ray.run.locks import only_command, remove_unstarted
from craft_ray.run.mirror import mirrored_folder
from craft_ray.run.training import training
from craft_ray.storage.files import write_atomically
from craft_ray.storage.last import last_checkpoint
from craft_ray.storage.paths import ObjectPath, StoragePath, remove_tree, storage_path
from craft_ray.tracking import TrackedRun, Tracker, TrackingObserver, open_trackers
from craft_ray.tracking.tensorboard import TensorBoardObserver
from craft_ray.workers import OneWorker, ProcessGroup, Workers

ABORT_S = 30.0
"""How long an interrupted run waits for its workers to end."""


@dataclass(frozen=True)
class PlannedRun:
    """A run to train, and its folder."""

    config: Experiment
    folder: RunFolder


def plan_run(config: Experiment) -> PlannedRun:
    """A new run in the output folder of its config. Nothing is written before the run is locked.

    Raises:
        ConfigError: a run of that name exists.
    """
    return PlannedRun(config, check_new(config))


def check_new(config: Experiment) -> RunFolder:
    """The folder of a run that has not started.

    Raises:
        ConfigError: the run exists.
    """
    folder = RunFolder(storage_path(config.output_dir) / config.run_name)
    check_kept(folder.path, "output_dir")
    if folder.finished() is not None:
        raise ConfigError(
            f"the run {folder.path} is finished, its scores are in result.json: choose another name=... or seed=..., "
            f"or delete it"
        )
    if folder.started:
        raise ConfigError(
            f"the run {folder.path} has started: resume it with --resume {folder.path}, or choose another name=... or "
            f"seed=..."
        )
    return folder


def resume_run(
    path: StoragePath, config: Experiment | None = None, changes: Mapping[str, Any] | None = None
) -> PlannedRun:
    """A started run, to resume from its last checkpoint (or from the start if it has none yet).

    Args:
        config: what it is resumed with; by default its own.
        changes: new values, by dotted key, for what decides no number.

    Raises:
        ConfigError: the run is finished, or what decides a number is not what it started with.
    """
    folder = RunFolder(path.absolute())
    asked = (config or folder.config()).changed(changes or {})
    if folder.finished() is not None:
        raise ConfigError(f"the run {path} is finished: its scores are in {folder.result}")
    check_config(folder, asked)
    return PlannedRun(asked, folder)


def check_inputs(config: Experiment) -> None:
    """Check, before any process starts, that the cache holds what the config needs, complete and undamaged."""
    if config.craft.enabled and config.craft.anchor_cache_dir is not None:
        folder = storage_path(config.craft.anchor_cache_dir)
        manifest = read_manifest(folder)
        select(folder, manifest.identity, config)
        # Shards in an object store are checked by the nodes that fetch them for training.
        check = check_sizes if isinstance(folder, ObjectPath) else check_shards
        check(folder, manifest)


def train_run(run: PlannedRun) -> dict[str, Any]:
    """Train one run, with its log lines on the console.

    Raises:
        ConfigError: another command is training it.
    """
    with only_command(run.folder):
        if not run.folder.started:
            run.folder.write_environment(command_line())
        observer = ConsoleObserver(run.config.train.steps, run.config.arm)
        try:
            check_inputs(run.config)
            trackers = open_trackers(run.config.tracking, run.folder.path)
            with (
                TrackingObserver(observer, [tracked(tracker, run) for tracker in trackers]) as watched,
                following(run.folder.progress, watched),
            ):
                run_on_trainer([run])
        except KeyboardInterrupt:
            raise Interrupted(_kept(run)) from None
        except CraftError:
            remove_unstarted(run.folder)  # a mistake before the first step leaves nothing behind
            raise
        finally:
            observer.close()
    result = run.folder.finished()
    assert result is not None
    return result


def _kept(run: PlannedRun) -> str:
    """What an interruption has left of a run, and how to continue."""
    path, records = run.folder.path, run.folder.read_metrics()
    if not records:
        return "interrupted before the first step: nothing was kept, start the run again with the same command"
    step, last = records[-1]["step"], last_checkpoint(run.folder.checkpoints)
    resume = f"craft-ray train --resume {path}"
    if last is None:
        return (
            f"interrupted after step {step}, before the first checkpoint: nothing was kept, and {resume} starts from "
            f"the beginning (train.checkpoint_every=N keeps every N-th step)"
        )
    return f"interrupted after step {step}: continue from the checkpoint at step {checkpoint_step(last)} with {resume}"


def tracked(tracker: Tracker, run: PlannedRun) -> TrackedRun:
    """The run in a tracker; a resumed run continues the one that it started with."""
    path = run.folder.path / f"tracking-{tracker.name}.json"
    known = json.loads(path.read_text())["id"] if path.exists() else None
    found = tracker.start(run.folder.path.name, run.config.model_dump(mode="json"), id=known)
    write_atomically(path, json.dumps({"id": found.id}))
    return found


class _Trainer(TorchTrainer):
    """Without two processes of each run that would have nothing to do: the one that distributes Ray datasets to the
    workers, which read their data themselves; and, on a cluster without a dashboard, the one that asks the dashboard
    whether the controller still lives. And without Ray's handler of Ctrl-C, which ignores a second one: ours stays, and
    `abort` ends the workers."""

    _controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback,) if may_have_dashboard() else (DatasetsCallback, PlacementGroupCleanerCallback)
        every = super()._create_default_callbacks()  # type: ignore[misc]  # of Train V2's trainer
        return [each for each in every if not isinstance(each, idle)]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """End the workers of a run that this process no longer waits for."""
        if self._controller is not None:
            with suppress(Exception):  # the controller ends before it can answer, or is lost already
                ray.get(self._controller.abort.remote(), timeout=ABORT_S)


def run_on_trainer(runs: Sequence[PlannedRun], supervised: bool = False, memory: int | None = None) -> None:
    """Train runs one after the other on the same workers; finished runs are skipped.

    Args:
        supervised: wait after each validation for the stop signal (craft_pipelines.stop_signal), and obey it.
        memory: bytes of its node's memory that each worker requests from Ray, where several runs share a cluster.

    Raises:
        CraftError: a run cannot continue; the message is the worker's.
    """
    quiet_ray()
    workers = runs[0].config.workers
    assert all(run.config.workers == workers for run in runs), "runs of one trainer share its workers"
    if workers.num_workers:
        join()
        lacking = check_resources(workers.least, resources(workers), "workers.num_workers")
        if lacking:
            raise ConfigError(lacking)
        if not supervised:  # a supervisor has checked the folder of all its runs
            check_shared(runs[0].folder.path, "output_dir")
            line(f"starting {workers.count} worker(s)" + (f" for {len(runs)} runs" if runs[1:] else ""))
    scratch = runs[0].folder.path / ".ray"
    remove_tree(scratch)  # a killed driver may have left an error there
    trainer = _Trainer(
        _run_worker,  # type: ignore[arg-type]  # what it returns is the result's return_value
        train_loop_config={
            "runs": [(dump_config(run.config), str(run.folder.path)) for run in runs],
            "threads": workers.threads,
            "scratch": str(scratch),
            "supervised": supervised,
        },
        torch_config=ProcessGroupConfig("nccl" if workers.use_gpu else "gloo"),  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,  # type: ignore[arg-type]  # of Train V2, which takes a pair
            use_gpu=workers.use_gpu,
            resources_per_worker=resources(workers) | ({} if memory is None else {"memory": memory}),
        ),
        # A name is used once: Ray returns the old result if a finished name is run again.
        run_config=RunConfig(
            name=f"{runs[0].folder.path.name}-{uuid.uuid4().hex[:12]}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
    resumes = f"the same command (train: with --resume {runs[0].folder.path}) resumes"
    try:
        outcome = trainer.fit().return_value  # type: ignore[attr-defined]  # of Train V2's Result
    except KeyboardInterrupt:
        trainer.abort()
        raise
    except ray.train.WorkerGroupError as error:
        failures = list(error.worker_failures.values())
        mistake = next((failure for failure in failures if isinstance(failure, CraftError)), None)
        if mistake is None and any(map(is_loss, failures)):
            mistake = CraftError(
                f"a worker was lost more than workers.max_failures={workers.max_failures} times (with its machine, or "
                f"out of memory): {resumes}"
            )
        raise mistake or error from None
    except (ray.train.ControllerError, *LOST_PROCESS_ERRORS) as error:
        raise CraftError(
            f"the process that controls the run was lost, often because the machine is out of memory "
            f"({first_line(getattr(error, 'controller_failure', error))}): use fewer or smaller processes at a time; "
            f"{resumes}"
        ) from None
    finally:
        remove_tree(scratch)
    if outcome is not None and outcome["error"] is not None:
        raise CraftError.from_message(**outcome["error"])


def is_loss(failure: BaseException) -> bool:
    """Whether a worker was lost, rather than its run failed: Train notices that by its health checks."""
    if isinstance(failure, WorkerHealthCheckFailedError):
        failure = failure.health_check_failure
    return isinstance(failure, (*LOST_PROCESS_ERRORS, WorkerHealthCheckTimeoutError))


def resources(workers: WorkersConfig) -> dict[str, float]:
    """The cluster resources of one worker."""
    gpu = {"GPU": 1.0} if workers.use_gpu else {}
    return {"CPU": workers.cpus_per_worker, **gpu, **workers.resources_per_worker}


def _run_worker(loop: dict[str, Any]) -> dict[str, Any]:
    """The function that each worker runs.

    Ray restarts the workers on any exception. That does not fix a user's mistake, so it is returned as a value; with
    several workers it is first written to a file, because the others hang in a collective until they are ended, and the
    restarted ones read it.
    """
    quiet_libraries()
    torch.set_num_threads(loop["threads"])
    error_file = storage_path(loop["scratch"]) / "error.json"
    if error_file.exists():
        return {"error": json.loads(error_file.read_text())}
    workers = _workers()
    try:
        for text, path in loop["runs"]:
            run = RunFolder(storage_path(path))
            if run.finished() is None:
                config = parse_config(read_yaml(text), str(run.path / "config.yaml"))
                with mirrored_folder(run, main=workers.rank == 0) as folder:
                    _train_in_worker(config, folder, workers, StopSignal(run.path) if loop["supervised"] else None)
    except CraftError as error:
        message = {"message": error.message, "exit_code": error.exit_code}
        if workers.world_size == 1:
            return {"error": message}
        with suppress(StorageError):  # the error may be a full disk
            write_atomically(error_file, json.dumps(message))
        raise
    return {"error": None}


def _train_in_worker(config: Experiment, folder: RunFolder, workers: Workers, stop_signal: StopSignal | None) -> None:
    """Train one run. With `stop_signal` it waits after each validation for permission to continue."""
    observer, main = FileObserver(folder.progress), workers.rank == 0
    with (
        RayMetrics(folder.home, config.arm, config.train.steps, observer, main) as measured,
        TensorBoardObserver(folder.disk / "tensorboard", measured, main) as watched,
        closing(training(config, folder, workers, watched)) as validations,
    ):
        for validation in validations:
            # All workers follow the signal that the first one received.
            proceed = stop_signal.wait(validation["step"]) if stop_signal and main else True
            if not workers.gather(proceed)[0]:
                break


def _workers() -> Workers:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return ProcessGroup(get_device())
    return OneWorker(get_device())
