"""Anchor caches of earlier tools: torch shards `shard_*.pt`, read without running code that a pickle could contain.

A shard is a dict of tensors over B rows:

    input_ids, attention_mask           [B, S], padded on either side
    pixel_values                        [B, C, H, W] float; none for language models
    teacher_hidden or target_features   [B, L, V, D]; [B, V, D] where L is 1, [B, L, D] where V is 1, [B, D] where both
                                        are. V is the number of anchor positions, in the config's order
    labels                              [B, S']; -100 is no token. In the shape of input_ids, the prompt is what has no
                                        label; in another shape, labels are the suffix alone, and input_ids the prompt
    meta                                a dict of facts; layers and pooling are compared with the config
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from craft_ray.anchors.manifest import Identity
from craft_ray.config import POSITIONS
from craft_ray.errors import CacheRefused, ConfigError, first_line
from craft_ray.models.base import IGNORE, resolve_layers

VECTORS = ("teacher_hidden", "target_features")
LAYER_FACTS = ("layers", "layer_indices", "hidden_layers", "hidden_layer")
POSITION_FACTS = ("positions", "pooling")
EARLIER_NAMES = {"mean_image_tokens": "vision_mean", "mean_masked": "masked_mean"}


@dataclass(frozen=True)
class LegacyRows:
    """The rows of one shard, in the cache's terms. B rows, V vectors of F = L * D numbers."""

    ids: list[str]
    prompts: list[np.ndarray]
    """int32 token ids, without padding and without the suffix."""
    pixels: Tensor | None
    """[B, C, H, W] float32."""
    suffixes: list[list[int]] | None
    vectors_BVF: Tensor | None


class LegacyShards:
    """The shards of a folder, loaded one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("shard_*.pt"))
        if not self.files:
            raise ConfigError(f"there are no legacy shards in {folder}: specify a folder that holds shard_*.pt")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all content; no path is part of it."""
        digest = blake3(max_threads=blake3.AUTO)
        for file in self.files:
            digest.update(file.name.encode())
            digest.update_mmap(file)
        return digest.hexdigest()[:32]

    def load(self, file: Path, identity: Identity) -> LegacyRows:
        """The rows of one shard, checked against the config's layers and positions.

        Raises:
            CacheRefused: the file is damaged, contains code, or does not match the config.
        """
        shard = _Reader(file, _load(file))
        shard.compare_facts(identity)
        mask_BS = shard.tensor("attention_mask").bool()
        ids_BS = shard.tensor("input_ids")
        if ids_BS.ndim != 2 or ids_BS.shape != mask_BS.shape:
            shard.refuse(f"input_ids {_shape(ids_BS)} and attention_mask {_shape(mask_BS)} are not both [B, S]")
        wanted, suffixes = identity.schema.has_suffix, None
        if wanted or "labels" in shard.content:  # they also show where the prompt ends
            mask_BS, suffixes = shard.suffixes(ids_BS, mask_BS, wanted)
        return LegacyRows(
            ids=[f"{file.stem}:{row}" for row in range(len(ids_BS))],
            prompts=[ids[mask].numpy().astype(np.int32) for ids, mask in zip(ids_BS, mask_BS, strict=True)],
            pixels=shard.pixels(len(ids_BS), identity.kind),
            suffixes=suffixes if wanted else None,
            vectors_BVF=shard.vectors(len(ids_BS), identity) if identity.schema.has_hidden else None,
        )


def _load(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CacheRefused(
            f"{file} is damaged or holds more than tensors, numbers and text: a pickle that runs code is not loaded; "
            f"save it again as a dict of tensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CacheRefused(f"{file} is damaged ({first_line(error)[:120]}): fetch or write it again") from None
    if not isinstance(content, dict):
        raise CacheRefused(f"{file} holds a {type(content).__name__}, a legacy shard is a dict of tensors")
    return content


@dataclass(frozen=True)
class _Reader:
    """One loaded shard; every mismatch names the file."""

    file: Path
    content: dict[str, Any]

    def refuse(self, what: str) -> NoReturn:
        raise CacheRefused(f"{self.file}: {what}")

    def tensor(self, name: str) -> Tensor:
        value = self.content.get(name)
        if not isinstance(value, Tensor):
            held = ", ".join(map(str, self.content)) or "nothing"
            self.refuse(f"it has no tensor {name}, it holds {held}; a legacy shard needs one")
        return value

    def compare_facts(self, identity: Identity) -> None:
        """Compare the shard's own metadata with the config. Unknown names of pooling are skipped: there the comparison
        with the teacher decides."""
        meta = self.content.get("meta")
        if not isinstance(meta, dict):
            return
        for key in LAYER_FACTS:
            if key in meta:
                layers = [int(k) for k in _listed(meta[key])]
                try:
                    found = resolve_layers(layers, identity.num_hidden_states)
                except ValueError as error:
                    raise CacheRefused(f"{self.file}: its meta has {key} {layers}, but {error}") from None
                if found != identity.layers:
                    self.refuse(
                        f"its meta says {key} {layers}, the config says anchors.layers {list(identity.layers)}: "
                        f"set anchors.layers={layers}"
                    )
        for key in POSITION_FACTS:
            names = [EARLIER_NAMES.get(str(name), str(name)) for name in _listed(meta.get(key, []))]
            if names and set(names) <= set(POSITIONS) and names != list(identity.positions):
                self.refuse(
                    f"its meta says {key} {', '.join(names)}, the config says anchors.positions "
                    f"{', '.join(identity.positions)}: set anchors.positions=[{','.join(names)}]"
                )

    def pixels(self, rows: int, kind: str) -> Tensor | None:
        if (kind == "vision_language") != ("pixel_values" in self.content):
            has = "has" if "pixel_values" in self.content else "has no"
            self.refuse(f"it {has} pixel_values, the config's model is a {kind}: change model.kind or model.path")
        if kind != "vision_language":
            return None
        pixels = self.tensor("pixel_values")
        if pixels.ndim != 4 or len(pixels) != rows or not pixels.is_floating_point():
            self.refuse(f"pixel_values is {_shape(pixels)} {pixels.dtype}, [{rows}, C, H, W] float is expected")
        return pixels.float().contiguous()

    def vectors(self, rows: int, identity: Identity) -> Tensor:
        """The teacher's vectors, [B, V, L * D]."""
        names = [name for name in VECTORS if name in self.content]
        if not names:
            self.refuse(
                f"it holds no hidden states ({' or '.join(VECTORS)}), anchors.modes asks for hidden: set "
                f"anchors.modes=[token_ce]"
            )
        given = self.tensor(names[0])
        if len(names) == 2 and not torch.equal(given, self.tensor(names[1])):
            self.refuse(f"{names[0]} and {names[1]} are both present and differ: keep one of them")
        layers, count, width = len(identity.layers), len(identity.positions), identity.hidden_size
        shapes: set[tuple[int, ...]] = {(layers, count, width)}
        if layers == 1:
            shapes.add((count, width))
        if count == 1:
            shapes.add((layers, width))
        if layers == count == 1:
            shapes.add((width,))
        if len(given) != rows or tuple(given.shape[1:]) not in shapes:
            self.refuse(
                f"{names[0]} is {_shape(given)}, the config says {rows} rows, {layers} layers {list(identity.layers)}, "
                f"{count} positions ({', '.join(identity.positions)}) and width {width}: set anchors.layers and "
                f"anchors.positions to what the shards hold"
            )
        return given.reshape(rows, layers, count, width).transpose(1, 2).flatten(2)

    def suffixes(self, ids_BS: Tensor, mask_BS: Tensor, wanted: bool) -> tuple[Tensor, list[list[int]]]:
        """Which tokens are the prompt, [B, S], and the suffix tokens of each row."""
        if "labels" not in self.content:
            self.refuse("it holds no labels, anchors.modes asks for token_ce: set anchors.modes=[hidden]")
        labels = self.tensor("labels").long()
        if labels.ndim != 2 or len(labels) != len(ids_BS):
            self.refuse(f"labels is {_shape(labels)}, [{len(ids_BS)}, S] is expected")
        labelled = labels != IGNORE
        suffixes = [row[chosen].tolist() for row, chosen in zip(labels, labelled, strict=True)]
        if wanted and not all(suffixes):
            self.refuse(f"row {suffixes.index([])} has no label: remove it, or set anchors.modes=[hidden]")
        if labels.shape != ids_BS.shape:
            return mask_BS, suffixes
        labelled &= mask_BS
        prompt_BS = mask_BS & ~labelled
        if not torch.equal(labels[labelled], ids_BS[labelled].long()):
            self.refuse("labels differ from the input_ids at their positions: shifted labels are not supported")
        positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        last_prompt = positions_BS.masked_fill(~prompt_BS, -1).amax(1)
        first_label = positions_BS.masked_fill(~labelled, ids_BS.shape[1]).amin(1)
        if bool((last_prompt > first_label).any()):
            row = int((last_prompt > first_label).nonzero()[0])
            self.refuse(f"row {row} has prompt tokens after its labels: a suffix follows the whole prompt")
        return prompt_BS, suffixes


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
