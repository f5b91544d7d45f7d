"""`craft-ray train --dry-run`: resolve and check the config, take three steps in this process, print the plan."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from craft_pipelines.console import ConsoleObserver
from craft_pipelines.session import check_resources, join
from craft_pipelines.train import check_inputs, check_new, resources
from craft_ray.config import Experiment, dump_config
from craft_ray.errors import ConfigError
from craft_ray.run.cost import cost_line
from craft_ray.run.folder import RunFolder
from craft_ray.run.held_out import SECTIONS, eval_sets
from craft_ray.run.shown import shown_samples
from craft_ray.run.training import Run, check_every_row
from craft_ray.storage.paths import storage_path
from craft_ray.workers import OneWorker

STEPS = 3


def dry_run(config: Experiment) -> None:
    """Check for everything that would make a run fail in its first minute.

    Raises:
        CraftError: as the run itself would.
    """
    check_inputs(config)
    check_new(config)
    workers = config.workers
    if workers.use_gpu and not torch.cuda.is_available():
        print("workers.use_gpu is set and this machine has no GPU: the three steps run on its CPUs")
    device = torch.device("cuda" if workers.use_gpu and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(workers.threads)
    if workers.num_workers:
        join()
        needed = {name: amount for name, amount in resources(workers).items() if name != "GPU" or device.type == "cuda"}
        lacking = check_resources(workers.least, needed, "workers.num_workers")
        if lacking:
            raise ConfigError(lacking)
    print(f"What differs from the defaults (craft-ray config show prints all):\n{dump_config(config, changed=True)}")
    observer = ConsoleObserver(STEPS, config.arm)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            # Log every step here, however seldom the run itself logs.
            run = Run(
                config.changed({"train.log_every": 1}), RunFolder(Path(scratch) / "run"), OneWorker(device), observer
            )
            for section in SECTIONS:
                for skill, eval_set in eval_sets(config, section):
                    run.held_out.data(section, skill, eval_set)
            check_every_row(run)
            run.loop(until=STEPS)
            print("A sample of each source as the model reads it, what counts in [[ ]]:")
            for line in shown_samples(run.model, run.task, run.constraints.each, run.held_out):
                print(f"  {line}")
            steps = run.folder.read_metrics()
            cost = cost_line(config, steps, run.model.module, run.optimizer, device.type == "cuda")
            run.close()
        finally:
            observer.close()
    where = f"{workers.count} worker(s) of {resources(workers)}" if workers.num_workers else "this process"
    print(cost)
    print(
        f"Plan: {config.train.steps} steps of {config.train.batch_size} samples on {where}, arm {config.arm}, into "
        f"{storage_path(config.output_dir) / config.run_name}. "
        f"Nothing of these {min(STEPS, config.train.steps)} steps was kept."
    )
