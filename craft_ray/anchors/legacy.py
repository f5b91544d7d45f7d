"""The rows of an earlier cache's shard, as this product's layers and positions.

A shard is a dict of tensors over B rows:

    input_ids, attention_mask           [B, S], padded on either side
    pixel_values                        [B, C, H, W] float; none for language models
    teacher_hidden or target_features   [B, L, V, D]; [B, V, D] where L is 1, [B, L, D] where V is 1, [B, D] where both
                                        are. V is the number of anchor positions, in the config's order
    labels                              [B, S']; -100: no token. In the shape of input_ids, the prompt is what has no
                                        label before the first one, and what follows the last label is cut; in
                                        another shape, labels are only the suffix, and input_ids the prompt
    meta                                a dict of facts; layers and pooling name the vectors (legacy_facts.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from craft_ray.anchors.legacy_facts import Facts, read_facts
from craft_ray.anchors.legacy_files import read_shard
from craft_ray.anchors.manifest import Identity
from craft_ray.errors import CacheRefused
from craft_ray.models.base import IGNORE

VECTORS = ("teacher_hidden", "target_features")


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
    """In the type that the shard holds them in."""
    note: str | None = None
    """What was converted, for the user."""

    @property
    def dtype(self) -> str:
        """The type of the vectors."""
        assert self.vectors_BVF is not None
        return _dtype(self.vectors_BVF)


def load_rows(file: Path, identity: Identity) -> LegacyRows:
    """The rows of one shard, as the config's layers and positions.

    Raises:
        CacheRefused: the file is damaged, contains code, or does not match the config.
    """
    shard = _Reader(file, read_shard(file))
    facts = read_facts(file, shard.content.get("meta"), identity)
    mask_BS = shard.tensor("attention_mask").bool()
    ids_BS = shard.tensor("input_ids")
    if ids_BS.ndim != 2 or ids_BS.shape != mask_BS.shape:
        shard.refuse(f"input_ids {_shape(ids_BS)} and attention_mask {_shape(mask_BS)} are not both [B, S]")
    wanted, suffixes = identity.schema.has_suffix, None
    if wanted or "labels" in shard.content:  # they also show where the prompt ends
        mask_BS, suffixes = shard.suffixes(ids_BS, mask_BS, wanted)
    vectors = shard.vectors(len(ids_BS), identity, facts) if identity.schema.has_hidden else None
    return LegacyRows(
        ids=[f"{file.stem}:{row}" for row in range(len(ids_BS))],
        prompts=[ids[mask].numpy().astype(np.int32) for ids, mask in zip(ids_BS, mask_BS, strict=True)],
        pixels=shard.pixels(len(ids_BS), identity.kind),
        suffixes=suffixes if wanted else None,
        vectors_BVF=vectors,
        note=facts.note,
    )


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

    def pixels(self, rows: int, kind: str) -> Tensor | None:
        sees = kind in ("vision_language", "lerobot")
        if sees != ("pixel_values" in self.content):
            has = "has" if "pixel_values" in self.content else "has no"
            self.refuse(f"it {has} pixel_values, the config's model is a {kind}: change model.kind or model.path")
        if not sees:
            return None
        pixels = self.tensor("pixel_values")
        if pixels.ndim != 4 or len(pixels) != rows or not pixels.is_floating_point():
            self.refuse(f"pixel_values is {_shape(pixels)} {pixels.dtype}, [{rows}, C, H, W] float is expected")
        return pixels.float().contiguous()

    def vectors(self, rows: int, identity: Identity, facts: Facts) -> Tensor:
        """The teacher's vectors at the config's layers and positions, [B, V, L * D], in the shard's type."""
        names = [name for name in VECTORS if name in self.content]
        if not names:
            self.refuse(
                f"it holds no hidden states ({' or '.join(VECTORS)}), anchors.modes asks for hidden: set "
                f"anchors.modes=[token_ce]"
            )
        given = self.tensor(names[0])
        if len(names) == 2 and not torch.equal(given, self.tensor(names[1])):
            self.refuse(f"{names[0]} and {names[1]} are both present and differ: keep one of them")
        held_layers, held_positions = facts.layers or identity.layers, facts.positions or identity.positions
        layers, count, width = len(held_layers), len(held_positions), identity.hidden_size
        shapes: set[tuple[int, ...]] = {(layers, count, width)}
        if layers == 1:
            shapes.add((count, width))
        if count == 1:
            shapes.add((layers, width))
        if layers == count == 1:
            shapes.add((width,))
        if not given.is_floating_point() or len(given) != rows or tuple(given.shape[1:]) not in shapes:
            self.refuse(
                f"{names[0]} is {_shape(given)} {_dtype(given)}, the config and its meta say {rows} rows, {layers} "
                f"layers {list(held_layers)}, {count} positions ({', '.join(held_positions)}) and width {width}: set "
                f"anchors.layers and anchors.positions to what the shards hold"
            )
        given = given.reshape(rows, layers, count, width)
        given = given[:, [held_layers.index(k) for k in identity.layers]]
        given = given[:, :, [held_positions.index(position) for position in identity.positions]]
        return given.transpose(1, 2).flatten(2)

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
        positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        last_label = positions_BS.masked_fill(~labelled, -1).amax(1, keepdim=True)
        # What an earlier teacher generated after the end of its answer has no label: the row is cut there.
        behind_BS = (positions_BS > last_label) & labelled.any(1, keepdim=True)
        prompt_BS = mask_BS & ~labelled & ~behind_BS
        if not torch.equal(labels[labelled], ids_BS[labelled].long()):
            self.refuse("labels differ from the input_ids at their positions: shifted labels are not supported")
        last_prompt = positions_BS.masked_fill(~prompt_BS, -1).amax(1)
        first_label = positions_BS.masked_fill(~labelled, ids_BS.shape[1]).amin(1)
        if bool((last_prompt > first_label).any()):
            row = int((last_prompt > first_label).nonzero()[0])
            self.refuse(f"row {row} has prompt tokens after its labels: a suffix follows the whole prompt")
        return prompt_BS, suffixes


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
