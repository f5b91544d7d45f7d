"""The workers of a run joined into one group of torch.distributed, by a controller that does not import torch.

The controller of Ray Train only watches over the workers. With Ray's own `TorchConfig` it imports torch nevertheless,
which takes a third of its start and most of its memory. Here only the workers import it: they receive the functions
below by name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

PATIENCE_S = 1800
"""How long a collective operation waits for the other workers; Ray Train's own default."""
LEAVING_S = 30
"""How long the controller waits for workers to leave their group before it ends them."""


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Replaces Ray Train's TorchConfig."""

    backend: str
    """`nccl` between GPUs, `gloo` between CPUs."""

    @property
    def backend_cls(self) -> type[Backend]:
        return ProcessGroupBackend

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch.config import TorchConfig

        return TorchConfig().train_func_context  # sets a worker's GPU

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend}


class ProcessGroupBackend(Backend):
    """What the controller lets the workers do before and after the training function."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroupConfig)
        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        arguments = (backend_config.backend, address, port, size)
        ray.get([worker_group.execute_single_async(rank, join_group, rank, *arguments) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        leaving = worker_group.execute_async(leave_group, len(worker_group) > 1)
        ray.wait(leaving, num_returns=len(leaving), timeout=LEAVING_S)


def join_group(rank: int, backend: str, address: str, port: int, size: int) -> None:
    """Join the group, on a worker."""
    from ray.train.torch import config

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, size, "env://", PATIENCE_S)


def leave_group(destroy: bool) -> None:
    """Leave the group, on a worker, and free what torch keeps of its GPU."""
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=destroy)
