"""A bound that needs no labels: how many held-out anchors the student continues as the teacher did.

Whatever the right outputs are, accuracy(student) >= accuracy(teacher) - P(their outputs differ), because the student is
wrong where the teacher is right only if the two differ.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from craft_ray import interruption
from craft_ray.models.capabilities import token_model
from craft_ray.models.features import FeatureCache
from craft_ray.pace import Pace, Report, unreported
from craft_ray.retention.inputs import anchor_features
from craft_ray.retention.mode import RetentionMode, SampleMode, batches_of
from craft_ray.statistics import CONFIDENCE, rate_upper_bound
from craft_ray.workers import Workers

MOST_ANCHORS = 1000
"""Held-out anchors that are continued at most. Of so many, 5 % that differ bound the rate by 6.3 %: more anchors would
take longer and hardly lower that."""
AT_ONCE = 32
"""Anchors that are continued in one batch at most, the teacher's own default."""


def anchor_agreement(
    mode: RetentionMode[Any],
    rows: Sequence[int],
    batch_size: int,
    workers: Workers,
    cache: FeatureCache | None = None,
    report: Report = unreported,
) -> dict[str, Any] | None:
    """Continue anchors greedily, as far as the teacher did when the cache was built, and compare the tokens.

    The workers share the anchors, and all of them get the result. Where they share the model, too, all make the same
    passes: one without an anchor for the last repeats one, which does not count.

    Args:
        rows: the anchors of the cache that training has not seen. Of more than `MOST_ANCHORS`, so many are drawn, the
            same ones for each run on the cache.
        batch_size: anchors in a batch, as far as `AT_ONCE`.
        cache: preprocessed anchors of earlier runs in this process.
        report: receives how many anchors are continued.

    Returns:
        Of `anchors`, how many `agree` in every token, of which there are at most `tokens`; the points of accuracy,
        from 0 to 1, that are lost at most (`at_most_lost`), at `confidence`, by Clopper and Pearson. None without rows,
        and where the cache does not hold the teacher's own continuations.
    """
    if not rows or not isinstance(mode, SampleMode):
        return None
    anchors, identity = mode.anchors, mode.anchors.identity
    # What an earlier script generated was ended by its own rules, which its shards do not say.
    if not anchors.has_suffix or identity.suffix_from != "teacher" or identity.imported:
        return None
    model, prompts = token_model(mode.model), anchor_features(mode.model, anchors, cache=cache)
    chosen = sorted(random.Random(0).sample(list(rows), min(len(rows), MOST_ANCHORS)))
    own = chosen[workers.rank :: workers.world_size]
    repeated = -(-len(chosen) // workers.world_size) - len(own) if model.sharded else 0
    pace = Pace("continuing held-out anchors", len(chosen), report)
    same: list[bool] = []
    for part in batches_of([*own, *chosen[-1:] * repeated], min(batch_size, AT_ONCE)):
        interruption.check()
        continued = model.generate([prompts(row) for row in part], identity.max_new_tokens)
        same += [tokens == anchors.suffix(row) for row, tokens in zip(part, continued, strict=True)]
        pace.reached(len(same) * workers.world_size)
    pace.end()
    agree = sum(workers.gather(sum(same[: len(own)])))
    return {
        "agree": agree,
        "anchors": len(chosen),
        "at_most_lost": rate_upper_bound(len(chosen) - agree, len(chosen), CONFIDENCE),
        "confidence": CONFIDENCE,
        "tokens": identity.max_new_tokens,
    }
