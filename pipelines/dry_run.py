"""`craft-ray train --dry-run`: resolve, check, take three steps in this process, print the plan."""

from __future__ import annotations

import tempfile
from pathlib import Path

from craft_ray.config import Experiment, dump_config
from craft_ray.errors import ConfigError
from craft_ray.run_folder import RunFolder
from craft_ray.training import Run
from craft_ray.workers import OneWorker
from pipelines.console import ConsoleObserver
from pipelines.session import check_resources, join
from pipelines.train import check_inputs, resources, run_name

STEPS = 3


def dry_run(config: Experiment) -> None:
    """Everything that a run would trip over in its first minute.

    Raises:
        CraftError: what the run itself would raise.
    """
    check_inputs(config)
    workers = config.workers
    if workers.num_workers:
        join()
        lacking = check_resources(workers.num_workers, resources(workers), "workers.num_workers")
        if lacking:
            raise ConfigError(lacking)
    print(dump_config(config))
    observer = ConsoleObserver(STEPS, config.arm)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run = Run(config, RunFolder(Path(scratch) / "run"), OneWorker(), observer)
            run.loop(until=STEPS)
            run.close()
        finally:
            observer.close()
    place = f"{workers.num_workers} worker(s) of {resources(workers)}" if workers.num_workers else "this process"
    print(
        f"Plan: {config.train.steps} steps of {config.train.batch_size} samples on {place}, arm {config.arm}, into "
        f"{Path(config.output_dir) / run_name(config)}. "
        f"Nothing was kept of these {min(STEPS, config.train.steps)} steps."
    )
