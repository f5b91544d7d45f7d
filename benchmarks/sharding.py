"""What sharing a model between workers saves and costs: a worker's state against a replica's, and the time of a step.

State is counted (the bytes of its tensors) and measured (the resident memory after two steps, above what the process
held before the model). Targets: at most 0.55 of a replica's over two workers and 0.30 over four; a step over two
processes at most 1.3 of a replicated one, with 4 texts of 128 tokens each for the task and for the anchors; a step of
replicas that sums its gradients during the backward pass not slower than one that sums them at its end.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing import spawn

from benchmarks.harness import WALL, Ratio, Report, Row, Variant, arguments, interleaved
from benchmarks.memory import resident_bytes
from benchmarks.workload import SHAPES, RetentionTask, language_model
from craft_ray.config import CraftConfig
from craft_ray.method import overlap
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import GradientPair, local_part
from craft_ray.method.step import craft_step
from craft_ray.models.sharding import shard
from craft_ray.workers import OneWorker, ProcessGroup, Workers


class Worker:
    """A model of random weights in training, whole or shared between the workers."""

    def __init__(self, workers: Workers, size: str, batch: int, length: int, sharded: bool) -> None:
        model: Any = language_model(SHAPES[size]).train()
        if sharded:
            shard(model, init_device_mesh("cpu", (workers.world_size,)), "fp32")
        self.workers = workers
        self.task = RetentionTask.of(model, batch, length, seed=workers.rank)
        whole = model if isinstance(model, FSDPModule) else None
        self.gradients = GradientPair(model.named_parameters(), sharded=whole)
        self.optimizer = torch.optim.AdamW(self.gradients.parameters, lr=1e-5, fused=True)
        self.craft = CraftConfig(epsilon_start=0.1)
        self.state = DualState.start(self.craft)

    def step(self) -> None:
        task = self.task
        self.state, _ = craft_step(
            task.task_loss, [task.task], task.retention_loss, [task.anchors], self.state, 0.1,
            craft=self.craft, optimizer=self.optimizer, gradients=self.gradients, workers=self.workers, max_norm=1.0,
        )  # fmt: skip

    def counted(self) -> int:
        """Bytes of weights, both gradients and moments."""
        moments = [t for state in self.optimizer.state.values() for t in state.values() if t.ndim]
        parts = [local_part(t) for t in [*self.gradients.parameters, *moments]]
        return sum(t.numel() * t.element_size() for t in [*parts, *self.gradients.buffers])


def state(workers: Workers, size: str, sharded: bool) -> dict[str, int]:
    before = resident_bytes()
    worker = Worker(workers, size, 1, 16, sharded)
    for _ in range(2):
        worker.step()
    counted = worker.counted()
    if sharded:
        worker.task.model.reshard()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return {"counted": counted, "resident": resident_bytes() - before}


def times(workers: Workers, size: str, batch: int, length: int, rounds: int) -> dict[str, list[float]]:
    """The ratios of a step's time to a replicated one's, round by round: sharded, and with one sum at its end."""
    steps = {name: Worker(workers, size, batch, length, name == "sharded").step for name in ("replicated", "sharded")}
    with mock.patch.object(overlap, "BUCKET_BYTES", float("inf")):  # a single bucket is complete at the end
        steps["one sum"] = Worker(workers, size, batch, length, False).step
    variants = {name: Variant(step, dist.barrier) for name, step in steps.items()}
    measured = interleaved(variants, rounds, WALL, budget_s=float("inf"))  # all workers must stop after the same round
    plain = measured.seconds["replicated"]
    return {
        name: [t / p for t, p in zip(measured.seconds[name], plain, strict=True)] for name in ("sharded", "one sum")
    }


def on_workers(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the function returns on each of several processes in one gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, args=(count, folder, function, args), nprocs=count)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(count)]


def _worker(rank: int, count: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    workers = ProcessGroup(torch.device("cpu")) if count > 1 else OneWorker()
    torch.save(function(workers, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--size", default="smollm2", choices=SHAPES)
    options = parser.parse_args()
    size = "tiny" if options.tiny else options.size
    report = Report("sharding", WALL.name, judge=not options.tiny)
    [replica] = on_workers(1, state, size, False)
    for count, target in ((2, "<= 0.55"), (4, "<= 0.30")):
        found = on_workers(count, state, size, True)
        for kind in ("counted", "resident"):
            ratio = max(worker[kind] for worker in found) / replica[kind]
            note = f"replica {replica[kind] / 1e9:.2f} GB"
            report.add(
                Row(f"{size}: state of a worker of {count} / a replica's, {kind}", ratio, target=target, note=note)
            )
    # Weights are gathered once for each micro-batch, however many tokens it has: the fewer, the more it counts.
    for batch, length, aim in ((1, 16, None),) if options.tiny else ((2, 64, None), (4, 128, "<= 1.3")):
        ratios = on_workers(2, times, size, batch, length, options.rounds)[0]
        what = f"{size} {batch}x{length}: step over 2 processes"
        report.add(Row.of(f"{what}, sharded / replicated", Ratio.of(ratios["sharded"]), aim))
        aim = None if aim is None else ">= 0.98"
        report.add(Row.of(f"{what}, replicated: one sum at the end / overlapped", Ratio.of(ratios["one sum"]), aim))
    report.finish(options.json)


if __name__ == "__main__":
    main()
