"""Layers that torch.compile turns into kernels of their own, one for each kind of layer."""

from __future__ import annotations

import torch
from torch import nn

from craft_ray.errors import ConfigError, first_line
from craft_ray.models.sharding import find_blocks


def compile_blocks(module: nn.Module, device: torch.device) -> None:
    """Compile each of the layers that a model repeats, in place: the names of its weights do not change. Passes under
    `evaluating` (craft_ray/models/base.py) run as before.

    Raises:
        ConfigError: there are no such layers, or nothing on this machine can compile them.
    """
    require_compiler("model.compile is true", device)
    for block in find_blocks(module, "model.compile compiles a model by", "leave it out"):
        block.compile()


def require_compiler(why: str, device: torch.device) -> None:
    """
    Raises:
        ConfigError: torch.compile finds no compiler for the device.
    """
    try:
        if device.type == "cuda":
            import triton  # noqa: F401
        else:
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
    except Exception as error:  # torch has several, private ones
        raise ConfigError(
            f"{why}, and torch.compile finds no compiler here ({first_line(error)}): install one (g++; triton on a "
            f"GPU), or leave it out"
        ) from None
