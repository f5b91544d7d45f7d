"""One run of a trial as a stream of looks at the validation data: in this process, or on the workers of a trainer.

Whoever takes the next look lets the run go on; whoever closes the stream ends it, and its resources are free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator

import torch

from craft_pipelines.ray_metrics import RayMetrics
from craft_pipelines.stop_signal import StopSignal
from craft_pipelines.train import PlannedRun, run_on_trainer
from craft_ray.config import Experiment
from craft_ray.models.features import FeatureCache
from craft_ray.run.checkpoint import checkpoint_step
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import Record
from craft_ray.run.mirror import mirrored_folder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import training
from craft_ray.storage.last import last_checkpoint
from craft_ray.tracking.tensorboard import TensorBoardObserver
from craft_ray.workers import OneWorker

FEATURES = FeatureCache()
"""Preprocessed samples outlive a trial: the next one of this process reads the same."""
Looks = Callable[[Experiment, RunFolder], Generator[Record]]


def in_process(config: Experiment, folder: RunFolder) -> Generator[Record]:
    """Train here, on the graphics processor where the config asks for one."""
    torch.set_num_threads(config.workers.threads)
    workers = OneWorker(torch.device("cuda" if config.workers.use_gpu else "cpu"))
    with (
        mirrored_folder(folder) as copy,
        RayMetrics(folder.path, config.arm, config.train.steps, NullObserver(), enabled=True) as measured,
        TensorBoardObserver(copy.disk / "tensorboard", measured, enabled=True) as observer,
    ):
        yield from training(config, copy, workers, observer, FEATURES)


def on_trainer(config: Experiment, folder: RunFolder) -> Generator[Record]:
    """Train on workers of a TorchTrainer. They wait after each validation for the stop signal, so a run that is ended
    there gives its workers back by itself, and needs nobody to find and kill them."""
    if folder.finished() is not None:
        yield from folder.read_validation()
        return
    seen = _begin_again(folder)
    failures: list[BaseException] = []

    def carry_out() -> None:
        try:
            run_on_trainer([PlannedRun(config, folder)], supervised=True)
        except BaseException as error:  # raised again by the thread that watches
            failures.append(error)

    word = StopSignal(folder.path)
    word.clear()
    thread = threading.Thread(target=carry_out, daemon=True)
    thread.start()
    try:
        while True:
            running = thread.is_alive()  # asked first: whatever it wrote is then read below
            for look in folder.read_validation():
                if look["step"] > seen:
                    seen = look["step"]
                    yield look
                    word.send(seen, proceed=True)
            if failures:
                raise failures[0]
            if not running:
                return
            time.sleep(word.poll_s)
    finally:
        word.send(seen, proceed=False)
        thread.join()
        word.clear()


def _begin_again(folder: RunFolder) -> int:
    """Forget what a lost run wrote after its last checkpoint; the step of the last look that stays."""
    checkpoint = last_checkpoint(folder.checkpoints)
    if folder.read_validation():
        folder.keep_metrics_until(0 if checkpoint is None else checkpoint_step(checkpoint))
    return max((look["step"] for look in folder.read_validation()), default=0)
