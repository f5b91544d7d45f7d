"""What a node reports about itself. Runs on the node, so it imports nothing that is slow or may be missing."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import shutil
import time
from dataclasses import dataclass

PACKAGES = ("craft-ray", "ray", "torch", "transformers", "tokenizers", "pyarrow", "datasets", "numpy", "safetensors")
"""The packages that decide what is computed, or in which format it is written."""

SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Facts:
    python: str
    packages: dict[str, str | None]
    """The version of each package; None if it is not installed."""
    gpus: int
    """NVIDIA GPUs of the system, whether Ray offers them or not."""
    shared_memory: int
    """Bytes of /dev/shm; 0 if it does not exist."""


def facts() -> Facts:
    memory = shutil.disk_usage(SHARED_MEMORY).total if os.path.isdir(SHARED_MEMORY) else 0
    return Facts(platform.python_version(), {name: version(name) for name in PACKAGES}, gpus(), memory)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> int:
    return len(glob.glob("/dev/nvidia[0-9]*"))


def clock() -> float:
    """Seconds since 1970, by the clock of this node."""
    return time.time()
