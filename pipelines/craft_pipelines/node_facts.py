"""What a node tells of itself. Runs there, so it imports nothing that is slow or may be missing."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import shutil
import time
from dataclasses import dataclass

PACKAGES = ("craft-ray", "ray", "torch", "transformers", "tokenizers", "pyarrow", "datasets", "numpy", "safetensors")
"""Those that decide what is computed, or in which format it is written."""

SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Facts:
    python: str
    packages: dict[str, str | None]
    """None where it is not installed."""
    gpus: int
    """Of NVIDIA, that the system has, whether Ray offers them or not."""
    shared_memory: int
    """Bytes of /dev/shm; 0 where there is none."""


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
    """Seconds since 1970, by this node."""
    return time.time()
