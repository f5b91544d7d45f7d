"""Which reading of an earlier cache's tokens is meant: the one under which the teacher gives the stored numbers."""

from __future__ import annotations

import math

import torch

from craft_ray.anchors.legacy import LegacyRows
from craft_ray.anchors.manifest import Identity
from craft_ray.anchors.schema import STEP0_TOLERANCE
from craft_ray.errors import CacheRefused, DataError, first_line
from craft_ray.method.distance import TINY, hidden_loss
from craft_ray.method.pooling import Vectors
from craft_ray.models.base import Batch
from craft_ray.models.capabilities import TensorModel, token_model
from craft_ray.models.readings import Reading

TRIED_ROWS = 8


def choose_reading(rows: LegacyRows, identity: Identity, model: TensorModel, where: str) -> Reading:
    """The reading under which the model comes closest to some rows.

    Args:
        where: the shard, for messages.

    Raises:
        CacheRefused: the model does not take these tokens.
    """
    pixels = None if rows.pixels is None else rows.pixels[0].numpy()
    try:
        readings = model.readings(rows.prompts[0], pixels)
        return min(readings, key=lambda reading: _misfit(rows, reading, identity, model))
    except DataError as error:
        raise CacheRefused(f"{where}: {error.message}") from None
    except (ValueError, IndexError, RuntimeError) as error:  # the model's own: a size or a token that it does not take
        raise CacheRefused(f"{where}: {model.description} does not run on its tensors ({first_line(error)})") from None


def reproduced_positions(rows: LegacyRows, reading: Reading, identity: Identity, model: TensorModel) -> list[str]:
    """The positions at which the model gives the stored vectors, within what their storage explains."""
    if not identity.schema.has_hidden:
        return []
    found = distances(rows, reading, identity, model)
    tolerance = STEP0_TOLERANCE[identity.rounding, identity.precision]
    return [position for position, distance in found.items() if distance <= tolerance]


def distances(rows: LegacyRows, reading: Reading, identity: Identity, model: TensorModel) -> dict[str, float]:
    """How far the model is from some rows at each position, as a relative mean square."""
    assert rows.vectors_BVF is not None
    result = {}
    for index, position in enumerate(identity.positions):
        batch = _batch(rows, reading, identity, model, position)
        assert batch.pooling is not None
        with torch.inference_mode():
            ours = batch.pooling(model.hidden_states(batch, identity.layers))
            theirs_BLD = rows.vectors_BVF[: batch.samples, index].float().unflatten(1, (len(identity.layers), -1))
            theirs = Vectors(theirs_BLD[:, :, None].to(model.device), torch.ones_like(ours.valid_BV))
            result[position] = hidden_loss(ours, theirs).item()
    return result


def _misfit(rows: LegacyRows, reading: Reading, identity: Identity, model: TensorModel) -> float:
    """How many orders of magnitude the positions are away, together; or the share of suffix tokens that are not the
    likeliest ones. So a position that no reading reproduces does not outweigh one that only the right reading does."""
    if identity.schema.has_hidden:
        found = distances(rows, reading, identity, model)
        return sum(math.log10(distance + TINY) for distance in found.values())
    batch = _batch(rows, reading, identity, model, None)
    with torch.inference_mode():
        likeliest_BP = token_model(model).token_log_probs(batch)[1]
    return int((~likeliest_BP).sum()) / max(batch.tokens, 1)


def _batch(rows: LegacyRows, reading: Reading, identity: Identity, model: TensorModel, position: str | None) -> Batch:
    features = []
    for row in range(min(TRIED_ROWS, len(rows.ids))):
        pixels = None if rows.pixels is None else rows.pixels[row].numpy()
        suffix = None if rows.suffixes is None or position else reading.suffix(rows.suffixes[row])
        features.append(model.from_tensors(reading.prompt(rows.prompts[row]), pixels, suffix))
    return model.collate(features, None if position is None else [position]).to(model.device)
