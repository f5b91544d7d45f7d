"""The processes of a run as the training loop sees them: rank, sum, gather. Torch only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Pending(Protocol):
    """A sum over the workers that has begun."""

    def wait(self) -> object: ...


class Workers(Protocol):
    """One process among `world_size`."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over the workers, in place."""
        ...

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """The same, while the caller computes something else; the tensor is summed after `wait`."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, by rank, on every worker."""
        ...


@dataclass(frozen=True)
class OneWorker:
    """A run in a single process, without communication."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a device is immutable
    rank: int = 0
    world_size: int = 1

    def all_reduce(self, tensor: Tensor) -> None:
        pass

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        raise AssertionError("one worker has nothing to sum")

    def gather(self, value: Any) -> list[Any]:
        return [value]


class ProcessGroup:
    """A process of the initialised torch.distributed group.

    The model is not wrapped in DistributedDataParallel: its hooks silently miss a second backward pass, a direct call
    of a submodule, and `autograd.grad`. Both gradients are averaged explicitly instead, as flat buffers.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.device = device
        self.group = group
        """None: the default group."""
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def beside(self) -> ProcessGroup:
        """The same processes in a further group on the host, which another thread may use at the same time. All of them
        must ask for it."""
        return ProcessGroup(torch.device("cpu"), dist.new_group(backend="gloo"))

    def all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        pending = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert pending is not None, "this process is one of the group"
        return pending

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values
