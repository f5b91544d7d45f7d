"""Policies whose weights are shared out among workers: what is gathered at a time, and passes that stay in step.

pi05 and smolvla run the layers of two transformers side by side and never call a layer as a whole, so its weights would
not be gathered before they are used. Both call a layer's projections and its MLP as modules, so those are the blocks.
Everything else runs within `gathered`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from craft_ray.models.sharding import repeated_layers


def blocks_of(policy: Any) -> list[nn.Module]:
    """The parts of a policy whose weights are gathered one by one: the largest that its type calls as a whole."""
    core = policy.model
    if policy.name == "pi0_fast":
        return repeated_layers(core.paligemma_with_expert.paligemma)
    if policy.name == "act":
        backbone = core.backbone.children() if policy.config.image_features else ()
        stages = [part for part in backbone if isinstance(part, nn.Sequential)]
        return repeated_layers(core) + [block for stage in stages for block in stage]
    if policy.name == "pi05":
        both = core.paligemma_with_expert
        vision, *pair = both.paligemma.model.vision_tower, both.paligemma.model.language_model, both.gemma_expert.model
    else:
        both = core.vlm_with_expert
        vision, *pair = both.get_vlm_model().vision_model, both.get_vlm_model().text_model, both.lm_expert
    return repeated_layers(vision) + [block for part in pair for layer in part.layers for block in _called(layer)]


def _called(layer: Any) -> list[nn.Module]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, layer.mlp]


class _Values(TorchFunctionMode):
    """While open, what is given by its values is a tensor of the host: the ids of smolvla's special tokens are neither
    weights nor buffers, which the first worker would hand on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_host = {"device": "cpu"} if func in (torch.tensor, torch.as_tensor) else {}
        return func(*args, **on_host | (kwargs or {}))


@contextmanager
def without_data() -> Iterator[None]:
    """While open, modules are made on the meta device."""
    with torch.device("meta"), _Values():
        yield


@contextmanager
def in_step(part: nn.Module, idle: Callable[[], object], device: torch.device) -> Iterator[None]:
    """While open, each worker may generate for as long as it takes; one that is done makes the passes of the others.

    Args:
        part: runs once before each pass that not every worker makes, and is no block of its own.
        idle: such a pass, of anything.
    """

    def running(count: int) -> int:
        total = torch.tensor(count, device=device)
        dist.all_reduce(total)
        return int(total)

    def begins(_part: nn.Module, _inputs: Any) -> None:
        running(1)

    hook = part.register_forward_pre_hook(begins)
    try:
        yield
    finally:
        hook.remove()
    while running(0):
        idle()
