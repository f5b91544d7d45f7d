"""What a run will take, estimated from its first steps: time, memory, and room on the disk."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import nn

from craft_ray.config import Experiment
from craft_ray.run.metrics import Record


def cost_line(
    config: Experiment, steps: Sequence[Record], module: nn.Module, optimizer: torch.optim.Optimizer, cuda: bool
) -> str:
    """An estimate in words.

    Args:
        steps: the metrics of the first steps; the very first one also pays for what happens once.
        cuda: whether they ran on a GPU.
    """
    seconds = statistics.fmean(record["perf/step_s"] for record in steps[1:] or steps)
    checkpoint = checkpoint_bytes(module, optimizer)
    kept = config.train.keep_checkpoints + (config.train.keep_best is not None)
    return (
        f"About {_duration(seconds * config.train.steps)} for {config.train.steps} steps of {seconds:.2g} s, without "
        f"validations and scores; {_size(peak_memory(cuda))} of {'GPU memory' if cuda else 'memory'} at most; "
        f"{_size(checkpoint)} a checkpoint, {kept} kept"
    )


def checkpoint_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the weights that a checkpoint holds, all of them or an adapter's, and of the optimiser's state."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    frozen = len(trained) < len(list(module.parameters()))
    weights = trained if frozen else [*module.parameters(), *module.buffers()]
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.nbytes for t in [*weights, *moments])


def peak_memory(cuda: bool) -> int:
    """Bytes that this process has taken at most, on the GPU or on the host."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
