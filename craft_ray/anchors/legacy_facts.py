"""What an earlier shard says about its vectors: the keys `layers...` and `pooling...` of its `meta`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_ray.anchors.manifest import Identity
from craft_ray.config import POSITIONS
from craft_ray.config.types import current_position
from craft_ray.errors import CacheRefused
from craft_ray.models.base import resolve_layers

BLOCKS = "layers_to_save"
LAYER_FACTS = (BLOCKS, "layers", "layer_indices", "hidden_layers", "hidden_layer")
POSITION_FACTS = ("positions", "pooling", "pooling_strategy", "token_pooling")


@dataclass(frozen=True)
class Facts:
    """The order of a shard's vectors; None if it does not say."""

    layers: tuple[int, ...] | None = None
    """Indices into the hidden states, none negative."""
    positions: tuple[str, ...] | None = None
    note: str | None = None
    """What was converted, for the user."""


def read_facts(file: Path, meta: Any, identity: Identity) -> Facts:
    """The facts of a shard's `meta`, compared with the config. Unknown names of pooling are skipped: there the
    comparison with the teacher decides.

    Raises:
        CacheRefused: the shard does not hold what the config asks for, or a fact is not readable.
    """
    if not isinstance(meta, Mapping):
        return Facts()
    layers, note = None, None
    for key in LAYER_FACTS:
        if meta.get(key) is None:
            continue
        numbers = _numbers(file, key, meta[key])
        layers = _layers(file, key, numbers, identity)
        if list(layers) != [k + identity.num_hidden_states if k < 0 else k for k in numbers]:
            note = f"{key} {numbers} are blocks, counted from 0: hidden states {list(layers)} here"
    positions = None
    for key in POSITION_FACTS:
        names = tuple(current_position(name) for name in _names(meta.get(key)))
        if not names or not set(names) <= set(POSITIONS):
            continue
        if identity.schema.has_hidden and not set(identity.positions) <= set(names):
            raise CacheRefused(
                f"{file}: its meta says {key} {', '.join(names)}, the config says anchors.positions "
                f"{', '.join(identity.positions)}: set anchors.positions=[{','.join(names)}]"
            )
        positions = names
    return Facts(layers, positions, note)


def _layers(file: Path, key: str, numbers: list[int], identity: Identity) -> tuple[int, ...]:
    """The hidden states that a shard's numbers mean. The earlier tools counted blocks from 0, whereas hidden state 0 is
    the embeddings; negative numbers mean the same in both. One of their builders counted hidden states under other
    keys than `layers_to_save`, so there the config may say so, and the comparison with the teacher decides."""
    blocks = [k if k < 0 else k + 1 for k in numbers]
    found, reason = [], ""
    for candidate in [blocks] if key == BLOCKS or blocks == numbers else [blocks, numbers]:
        try:
            found.append(resolve_layers(candidate, identity.num_hidden_states))
        except ValueError as error:
            reason = reason or str(error)
    for layers in found:
        if set(identity.layers) <= set(layers) or not identity.schema.has_hidden:
            return layers
    if not found:
        raise CacheRefused(f"{file}: its meta has {key} {numbers}, but {reason}")
    here = numbers if blocks == numbers else list(found[0])
    converted = "" if here == numbers else f" (blocks, counted from 0: hidden states {here} here)"
    raise CacheRefused(
        f"{file}: its meta says {key} {numbers}{converted}, the config says anchors.layers {list(identity.layers)}: "
        f"set anchors.layers={here}"
    )


def _numbers(file: Path, key: str, value: Any) -> list[int]:
    """Layers as numbers, a list of them, or text such as "-2,-1"."""
    items = value.strip("[]() ").split(",") if isinstance(value, str) else value
    try:
        return [int(item) for item in (items if isinstance(items, (list, tuple)) else [items])]
    except (TypeError, ValueError):
        raise CacheRefused(
            f"{file}: its meta has {key} {value!r}, which names no layers: write numbers, such as [-2, -1]"
        ) from None


def _names(value: Any) -> Iterator[str]:
    """Names as a list, as text with commas, or as a mapping: {vision: mean, text: last} is vision_mean, text_last."""
    if isinstance(value, Mapping):
        yield from (f"{part}_{how}" for part, how in value.items())
    elif isinstance(value, str):
        yield from (name.strip() for name in value.split(","))
    elif isinstance(value, (list, tuple)):
        yield from map(str, value)
