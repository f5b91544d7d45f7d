"""Several processes in one gloo group, each a worker of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from craft_ray.quiet import quiet_libraries
from craft_ray.workers import ProcessGroup, Workers


def on_workers(count: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `function(workers, *arguments)` returns on each of `count` workers.

    Args:
        folder: for the files of the processes; it is made.
    """
    folder.mkdir(parents=True)
    spawn(_worker, args=(count, function, str(folder), arguments), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _worker(rank: int, count: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    workers: Workers = ProcessGroup(torch.device("cpu"))
    torch.save(function(workers, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
