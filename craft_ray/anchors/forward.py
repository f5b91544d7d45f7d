"""The teacher's forward passes: anchors of similar length padded to one another, or packed without any padding.

Both yield flat vectors for each position, anchor after anchor. F = L * D: all cached layers of a vector, concatenated.
The host does nothing token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from craft_ray.config import AnchorsConfig
from craft_ray.errors import ConfigError
from craft_ray.method.pooling import Layout, is_mean, token_positions, vector_count
from craft_ray.models.base import Features, Model
from craft_ray.models.capabilities import LogitsModel, PackingModel, packing_model
from craft_ray.models.packing import DEFAULT_BUDGET, plan_packs
from craft_ray.models.tokens import at_anchored


@dataclass(frozen=True)
class Pooled:
    """The vectors of some anchors at one position."""

    position: str
    rows: list[int]
    """Indices of the anchors in the input of the pass."""
    counts: list[int]
    """Vectors of each of them."""
    values_NF: Tensor
    """On the model's device, in the model's type; N is the sum of counts."""


def tokens_per_pack(model: Model, config: AnchorsConfig) -> int:
    """Tokens per pack, 0 if anchors are padded: what the config says, or else packs if the model can be packed.

    Raises:
        ConfigError: anchors.pack_tokens asks for packs and the model cannot be packed.
    """
    if config.pack_tokens == 0:
        return 0
    try:
        packing_model(model).check_packing()
    except ValueError as error:
        if config.pack_tokens is None:
            return 0
        raise ConfigError(
            f"anchors.pack_tokens is {config.pack_tokens}, but {error}: set anchors.pack_tokens=0, which pads"
        ) from None
    return config.pack_tokens or DEFAULT_BUDGET


def by_length(features: Sequence[Features], batch_size: int) -> list[list[int]]:
    """Batches of similar length, so that there is little padding; the longest first, which fails at once or never."""
    order = sorted(range(len(features)), key=lambda i: -features[i].layout.length)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.inference_mode()
def padded_vectors(
    model: Model, features: Sequence[Features], positions: Sequence[str], layers: Sequence[int], batch_size: int
) -> Iterator[Pooled]:
    """Vectors of all anchors, in batches padded on the right, as the student pools them."""
    for rows in by_length(features, batch_size):
        chosen = [features[i] for i in rows]
        batch = model.collate(chosen, positions).to(model.device)
        assert batch.pooling is not None
        values_BVLD = batch.pooling(model.hidden_states(batch, layers)).values_BLVD.transpose(1, 2)
        start = 0
        for position in positions:
            counts = [vector_count(f.layout, position) for f in chosen]
            most = max(counts)
            slots = torch.cat([torch.arange(count) + row * most for row, count in enumerate(counts)])
            values_NF = values_BVLD[:, start : start + most].flatten(2).flatten(0, 1)
            yield Pooled(position, rows, counts, values_NF[slots.to(values_NF.device)])
            start += most


@torch.inference_mode()
def packed_vectors(
    model: PackingModel, features: Sequence[Features], positions: Sequence[str], layers: Sequence[int], budget: int
) -> Iterator[Pooled]:
    """Vectors of all anchors, in packs of up to `budget` tokens."""
    for rows in plan_packs([f.layout.length for f in features], budget):
        chosen = [features[i] for i in rows]
        hidden_LTD = model.packed_hidden_states(chosen, layers)
        layouts = [f.layout for f in chosen]
        for position in positions:
            values_LND, counts = pool_pack(hidden_LTD, layouts, position)
            yield Pooled(position, rows, counts, values_LND.transpose(0, 1).flatten(1))


@torch.inference_mode()
def padded_logits(
    model: LogitsModel, features: Sequence[Features], position: str, batch_size: int
) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """The logits of all anchors at one position, in batches padded on the right: the rows, how many tokens each has,
    and the logits [N, V] at these."""
    for rows in by_length(features, batch_size):
        chosen = [features[i] for i in rows]
        batch, row_N, column_N = at_anchored(model.collate(chosen, [position]))
        logits_BPV = model.logits(batch.to(model.device))
        yield rows, [vector_count(f.layout, position) for f in chosen], logits_BPV[row_N, column_N]


@torch.inference_mode()
def packed_logits(
    model: PackingModel, features: Sequence[Features], position: str, budget: int
) -> Iterator[tuple[list[int], list[int], Tensor]]:
    """The same, in packs of up to `budget` tokens."""
    for rows in plan_packs([f.layout.length for f in features], budget):
        chosen = [features[i] for i in rows]
        tokens = tokens_in_pack([f.layout for f in chosen], position)
        yield rows, [len(own) for own in tokens], model.packed_logits(chosen, torch.cat(tokens))


def tokens_in_pack(layouts: Sequence[Layout], position: str) -> list[Tensor]:
    """The tokens that a position selects in each sequence of a pack, counted from the pack's start."""
    starts = accumulate((layout.length for layout in layouts), initial=0)
    return [
        torch.tensor(token_positions(layout, position)) + start
        for layout, (start, _) in zip(layouts, pairwise(starts), strict=True)
    ]


def pool_pack(hidden_LTD: Tensor, layouts: Sequence[Layout], position: str) -> tuple[Tensor, list[int]]:
    """The vectors [L, N, D] of a pack at one position, and how many each of its sequences has."""
    tokens = tokens_in_pack(layouts, position)
    if not is_mean(position):
        index_N = torch.cat(tokens).to(hidden_LTD.device)
        return hidden_LTD[:, index_N], [len(own) for own in tokens]
    weights_NT = torch.zeros(len(layouts), hidden_LTD.shape[1])
    for row, own in enumerate(tokens):
        weights_NT[row, own] = 1.0 / len(own)
    means_LND = weights_NT.to(hidden_LTD.device) @ hidden_LTD.float()
    return means_LND.to(hidden_LTD.dtype), [1] * len(layouts)
