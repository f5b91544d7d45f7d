"""Workers of one process."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Share:
    """One of several workers, each a thread, that exchange values through a shared table."""

    rank: int
    world_size: int
    table: list[Any]
    barrier: threading.Barrier
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def all_reduce(self, tensor: Tensor) -> None:
        raise AssertionError(f"an evaluation sums nothing on the device: {tensor}")

    start_all_reduce = all_reduce

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait(timeout=60)
        values = list(self.table)
        self.barrier.wait(timeout=60)  # no worker writes its next value before all have read this one
        return values
