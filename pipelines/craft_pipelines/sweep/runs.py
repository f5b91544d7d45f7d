"""One run of a trial as a stream of validation records: in this process, or on the workers of a trainer.

Taking the next record lets the run continue; closing the stream ends it and frees its resources.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator

import torch

from craft_pipelines.console import FileObserver
from craft_pipelines.ray_metrics import RayMetrics
from craft_pipelines.stop_signal import StopSignal
from craft_pipelines.train import PlannedRun, run_on_trainer
from craft_ray.config import Experiment
from craft_ray.models.features import FeatureCache
from craft_ray.run.checkpoint import checkpoint_step
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import Record
from craft_ray.run.mirror import mirrored_folder
from craft_ray.run.training import training
from craft_ray.storage.last import last_checkpoint
from craft_ray.tracking.tensorboard import TensorBoardObserver
from craft_ray.workers import OneWorker

FEATURES = FeatureCache()
"""Preprocessed samples outlive a trial: the next trial in this process reads the same ones."""
RunTrial = Callable[[Experiment, RunFolder], Generator[Record]]
"""Runs a config in a folder, and yields its validation records."""


def in_process(config: Experiment, folder: RunFolder) -> Generator[Record]:
    """Train in this process, on the GPU if the config asks for one."""
    torch.set_num_threads(config.workers.threads)
    workers = OneWorker(torch.device("cuda" if config.workers.use_gpu else "cpu"))
    with (
        mirrored_folder(folder) as copy,
        RayMetrics(folder.path, config.arm, config.train.steps, FileObserver(copy.progress), enabled=True) as measured,
        TensorBoardObserver(copy.disk / "tensorboard", measured, enabled=True) as observer,
    ):
        yield from training(config, copy, workers, observer, FEATURES)


def on_trainer(config: Experiment, folder: RunFolder) -> Generator[Record]:
    """Train on workers of a TorchTrainer. After each validation they wait for the stop signal, so a run that is ended
    there frees its workers by itself, and no process has to find and kill them."""
    if folder.finished() is not None:
        yield from folder.read_validation()
        return
    seen = _drop_unsaved(folder)
    failures: list[BaseException] = []

    def run_trainer() -> None:
        try:
            run_on_trainer([PlannedRun(config, folder)], supervised=True)
        except BaseException as error:  # raised again by the thread that watches
            failures.append(error)

    stop_signal = StopSignal(folder.path)
    stop_signal.clear()
    thread = threading.Thread(target=run_trainer, daemon=True)
    thread.start()
    try:
        while True:
            running = thread.is_alive()  # checked first, so that everything it wrote is read below
            for record in folder.read_validation():
                if record["step"] > seen:
                    seen = record["step"]
                    yield record
                    stop_signal.send(seen, proceed=True)
            if failures:
                raise failures[0]
            if not running:
                return
            time.sleep(stop_signal.poll_s)
    finally:
        stop_signal.send(seen, proceed=False)
        thread.join()
        stop_signal.clear()


def _drop_unsaved(folder: RunFolder) -> int:
    """Drop what a lost run wrote after its last checkpoint; return the step of the last validation that stays."""
    checkpoint = last_checkpoint(folder.checkpoints)
    if folder.read_validation():
        folder.keep_metrics_until(0 if checkpoint is None else checkpoint_step(checkpoint))
    return max((record["step"] for record in folder.read_validation()), default=0)
