"""A model whose weights are sharded among the workers: FSDP2 on every block and on the root.

Each worker holds its part of every weight, and of both gradients and the moments that belong to it. A block's weights
are gathered before it computes and freed after it; those outside the blocks (embeddings, last norm, head) belong to the
root and are gathered once for each pass. Only rank 0 reads the model's folder; the others begin with a model without
data and receive one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from craft_ray.errors import ConfigError, ModelError, first_line

Output = TypeVar("Output")

if TYPE_CHECKING:  # loading a model needs no pydantic
    from craft_ray.config import Precision, WorkersConfig
    from craft_ray.workers import Workers

BASE_FORWARD = "craft_base_forward"
"""The method of a sharded module that runs its base model: a direct call would find the root's weights sharded."""
RUN = "craft_run"
"""The method of a sharded module that runs a function."""


def open_mesh(config: WorkersConfig, workers: Workers) -> DeviceMesh | None:
    """How a run's model is sharded among its workers; None if each holds all of it. The last dimension is the
    workers that hold one copy together; `hybrid` has the copies before it."""
    if config.sharding == "none":
        return None
    assert workers.world_size > 1, "a config with one worker is refused"
    if config.sharding == "full":
        return init_device_mesh(workers.device.type, (workers.world_size,), mesh_dim_names=("shards",))
    shape = (workers.world_size // config.shards, config.shards)
    return init_device_mesh(workers.device.type, shape, mesh_dim_names=("replicas", "shards"))


def load_sharded(
    load: Callable[[], Any],
    empty: Callable[[], Any],
    mesh: DeviceMesh,
    precision: Precision,
    device: torch.device,
    blocks: Callable[[Any], Sequence[nn.Module]] | None = None,
) -> Any:
    """A module whose weights rank 0 loads and all workers share. Each of them has one whole weight at a time.

    Args:
        load: the module with its weights, on the host; called by rank 0.
        empty: the same module on the meta device; called by the others.
        blocks: finds what is gathered at a time; by default the layers that the module repeats.

    Raises:
        ModelError: it has no blocks that can be sharded, or keeps tensors that no other worker can be given.
    """
    module = load() if dist.get_rank() == 0 else empty()
    # A tied weight has one name here: FSDP keeps it tied.
    whole = dict(module.named_parameters()) if dist.get_rank() == 0 else {}
    shard(module, mesh, precision, (blocks or find_blocks)(module))
    if dist.get_rank() != 0:
        module.to_empty(device=device)
    else:
        module.to(device)
    for name, parameter in module.named_parameters():
        spread(whole.pop(name).detach() if whole else None, parameter)
    for _, buffer in module.named_buffers():
        dist.broadcast(buffer, 0)
    if hasattr(module, "generation_config"):
        generation = [module.generation_config]
        dist.broadcast_object_list(generation, 0)
        module.generation_config = generation[0]
    hidden = [name for part in module.modules() for name, value in vars(part).items() if _is_meta(value)]
    if hidden:
        raise ModelError(
            f"a {class_name(module)} keeps a tensor ({hidden[0]}) that is neither a weight nor a buffer, so only one "
            f"worker would have it: set workers.sharding=none"
        )
    return module


def shard(
    module: nn.Module, mesh: DeviceMesh, precision: Precision, blocks: Sequence[nn.Module] | None = None
) -> FSDPModule:
    """Shard a module in place: each block, then the rest as the root. In bf16, weights are gathered and computed with
    in bfloat16; the shards, and the sums of gradients, stay as they are."""
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    try:
        for block in find_blocks(module) if blocks is None else blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        sharded: FSDPModule = fully_shard(module, mesh=mesh, mp_policy=policy)
    except (ValueError, NotImplementedError) as error:  # a weight without dimensions, or one on another device
        raise ConfigError(
            f"workers.sharding: a {class_name(module)} cannot be sharded ({first_line(error)}): set "
            f"workers.sharding=none"
        ) from error
    if hasattr(module, "base_model"):
        setattr(module, BASE_FORWARD, _base_forward(module))
        register_fsdp_forward_method(module, BASE_FORWARD)
    setattr(module, RUN, lambda function: function())
    register_fsdp_forward_method(module, RUN)
    return sharded


def gathered(module: Any, function: Callable[[], Output]) -> Output:
    """What `function` returns. If the module is sharded, its weights outside the blocks are gathered meanwhile, so that
    the function may call any of its parts; what needs a gradient must be in a tensor, tuple, list or dict."""
    result: Output = getattr(module, RUN)(function) if isinstance(module, FSDPModule) else function()
    return result


def _base_forward(module: Any) -> Callable[..., Any]:
    return lambda **inputs: module.base_model(**inputs)


def base_forward(module: Any) -> Callable[..., Any]:
    """The forward pass of a model without its head, sharded or not."""
    return getattr(module, BASE_FORWARD) if isinstance(module, FSDPModule) else module.base_model


def find_blocks(
    module: nn.Module,
    what: str = "workers.sharding shares a model out by",
    remedy: str = "set workers.sharding=none",
) -> list[nn.Module]:
    """The layers that a model repeats: the outermost lists of modules of one kind. Lists inside a layer, as of experts,
    belong to it.

    Args:
        what, remedy: the beginning and the end of the message below.

    Raises:
        ConfigError: there are none, or they hold less than half of the weights outside embeddings and head, so that
            most of the model would be gathered at once.
    """
    blocks = repeated_layers(module)
    ends = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    head = getattr(module, "get_output_embeddings", lambda: None)()
    inner = _size([module]) - _size([*ends, *([] if head is None else [head])])
    if not blocks or _size(blocks) < inner / 2:
        share = f"hold {_size(blocks):,} of its {inner:,} weights" if blocks else "are not found"
        raise ConfigError(f"{what} its repeated layers, and those of a {class_name(module)} {share}: {remedy}")
    return blocks


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The layers with weights in the outermost lists of modules of one kind."""
    return [layer for layers in _outermost_lists(module) for layer in layers if _size([layer])]


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len({type(part) for part in child}) == 1:
            yield child
        else:
            yield from _outermost_lists(child)


def _size(parts: list[nn.Module]) -> int:
    """Weights in some modules, each counted once."""
    return sum(p.numel() for p in {id(p): p for part in parts for p in part.parameters()}.values())


@torch.no_grad()
def spread(whole: Tensor | None, parameter: Tensor) -> None:
    """Give each worker its part of a tensor that rank 0 has; `whole` is None on the others."""
    tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    if whole is not None:
        tensor.copy_(whole)
    dist.broadcast(tensor, 0)
    parameter.copy_(shard_of(tensor, parameter))


def shard_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """This worker's part of a tensor that every worker has, distributed as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. If it is sharded, every worker must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state of a module on the host, gathered weight by weight; every worker must ask for it.

    Args:
        keep: whether this worker keeps it; the others return nothing.
    """
    found: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in known:  # tied weights stay tied
            gathered = whole(tensor.detach())
            known[id(tensor)] = gathered.cpu() if keep else tensor
        if keep:
            found[name] = known[id(tensor)]
    return found


@contextmanager
def whole_shapes(module: nn.Module) -> Iterator[None]:
    """While open, each sharded weight has the shape of the whole one, without its values and without memory, for code
    that takes the shard's shape for the layer's. What it says about `requires_grad` stays."""
    held = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for part, name, parameter in held:
        like = torch.empty((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        setattr(part, name, nn.Parameter(like, requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for part, name, parameter in held:
            parameter.requires_grad_(getattr(part, name).requires_grad)
            setattr(part, name, parameter)


def save_whole(module: Any, folder: Path) -> None:
    """Save a sharded module as transformers does. Every worker must ask for it; rank 0 writes."""
    state = whole_state(module, keep=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        module.save_pretrained(folder, state_dict=state)


def class_name(module: nn.Module) -> str:
    """The name of a module's class before it was sharded."""
    return type(module).__name__.removeprefix("FSDP") if isinstance(module, FSDPModule) else type(module).__name__


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta
