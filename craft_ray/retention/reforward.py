"""Check that a model still reproduces a cache: run the teacher again on some rows, the way a student runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from craft_ray.anchors.manifest import Manifest
from craft_ray.anchors.matching import check_model
from craft_ray.anchors.reader import AnchorSet, open_anchors
from craft_ray.anchors.schema import STEP0_AGREEMENT, STEP0_TOLERANCE
from craft_ray.config import Experiment
from craft_ray.config.modes import stores
from craft_ray.errors import CacheRefused
from craft_ray.method.distance import hidden_loss
from craft_ray.method.pooling import Vectors
from craft_ray.models.base import Model
from craft_ray.retention.hidden import Hidden
from craft_ray.retention.logits import Logits
from craft_ray.retention.mode import batches_of
from craft_ray.retention.token_ce import TokenCE
from craft_ray.storage.paths import StoragePath

BATCH = 16


@dataclass(frozen=True)
class Agreement:
    """How far some cached rows are from what the model gives now."""

    rows: int
    distance: float | None
    """The largest relative mean square of a row; None if the cache has no hidden states."""
    divergence: float | None
    """The mean KL divergence from the cached logits, in nats a token; None if the cache has none."""
    tokens: int | None
    """Suffix tokens compared; None if they are not the teacher's own."""
    equal_tokens: int


@torch.no_grad()
def reforward(folder: StoragePath, manifest: Manifest, config: Experiment, model: Model, count: int) -> Agreement:
    """Run the model on `count` rows, spread over the cache, the way a student runs, and compare.

    Each suffix token is predicted from the cached ones before it, so that one near tie counts once.

    Raises:
        CacheRefused: it is another model, or it does not reproduce the cache; the worst row is named.
    """
    identity = manifest.identity
    check_model(folder, identity, config, model, model.weights_fingerprint())
    anchors = open_anchors(folder, manifest)
    count = min(count, len(anchors))
    rows = [i * len(anchors) // count for i in range(count)]
    distance = None
    if "hidden" in identity.modes:
        distance = _compare_vectors(model, anchors, rows)
    divergence = None
    if stores(identity.modes, "logits"):
        logits = Logits(model, anchors)
        logits.check_untouched(rows, BATCH)
        divergence = logits.mean_divergence(rows, BATCH)
    tokens, equal = None, 0
    if identity.schema.has_suffix and identity.suffix_from == "teacher":
        tokens, equal = _compare_tokens(model, anchors, rows)
    return Agreement(count, distance, divergence, tokens, equal)


def _compare_vectors(model: Model, anchors: AnchorSet, rows: Sequence[int]) -> float:
    identity = anchors.identity
    hidden = Hidden(model, anchors, identity.layers, identity.positions)
    distances: list[float] = []
    for part in batches_of(rows, BATCH):
        batch = hidden.batch(part).to(model.device)
        student = hidden.student_vectors(batch)
        for row in range(batch.inputs.samples):
            ours, theirs = (
                Vectors(v.values_BLVD[row : row + 1], v.valid_BV[row : row + 1]) for v in (student, batch.teacher)
            )
            distances.append(hidden_loss(ours, theirs).item())
    worst = max(range(len(rows)), key=lambda i: _nan_is_largest(distances[i]))
    tolerance = STEP0_TOLERANCE[identity.rounding, identity.precision]
    if not distances[worst] <= tolerance:
        raise CacheRefused(
            f"anchor {anchors.id(rows[worst])}: the cached vectors are {distances[worst]:.2e} away from what the "
            f"model gives (relative mean square), {identity.rounding} storage explains {tolerance:.0e}; preprocessing, "
            f"dropout, layers, positions or the teacher is not what the cache was built with: build it again"
        )
    return distances[worst]


def _nan_is_largest(value: float) -> float:
    return value if value == value else float("inf")


def _compare_tokens(model: Model, anchors: AnchorSet, rows: Sequence[int]) -> tuple[int, int]:
    suffixes = TokenCE(model, anchors)
    tokens, wrong = 0, []
    for part in batches_of(rows, BATCH):
        batch = suffixes.batch(part).to(model.device)
        _, likeliest_BP = suffixes.model.token_log_probs(batch.inputs)
        tokens += batch.count
        wrong += (~likeliest_BP).sum(1).tolist()
    equal = tokens - sum(wrong)
    least = STEP0_AGREEMENT[anchors.identity.precision]
    if equal < least * tokens:
        worst = max(range(len(rows)), key=wrong.__getitem__)
        raise CacheRefused(
            f"{equal} of {tokens} cached suffix tokens are the model's most likely ones, {least:.0%} are expected "
            f"(worst is anchor {anchors.id(rows[worst])} with {wrong[worst]} others): preprocessing, dropout or the "
            f"teacher is not what the cache was built with, or the tokens are not the teacher's own "
            f"(anchors.suffix_from)"
        )
    return tokens, equal
