"""How likely a model finds what follows a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from craft_ray.models.base import IGNORE, Features, Model
from craft_ray.models.capabilities import token_model
from craft_ray.workers import Workers


class Likelihood(NamedTuple):
    """The log-likelihood of a suffix in nats, its number of tokens, and how many of these are the model's choice."""

    total: float
    tokens: int
    hits: int


def likelihoods(model: Model, features: Sequence[Features]) -> list[Likelihood]:
    """The likelihood of the suffix of each sample, in one forward pass."""
    batch = model.collate(features).to(model.device)
    log_probs, best = token_model(model).token_log_probs(batch)
    predicted = batch.targets_BP != IGNORE
    columns = (log_probs.double().sum(1), predicted.sum(1), (best & predicted).sum(1))
    return [Likelihood(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def passes(model: Model, features: Sequence[Features], size: int, workers: Workers) -> Iterator[list[int]]:
    """The indices of samples in forward passes of `size`. Those of similar length share a pass, because padding is
    computed, too. Where the model is sharded, every worker makes as many passes: one that has no sample left gets an
    empty list, and makes the pass with any."""
    order = sorted(range(len(features)), key=lambda index: (features[index].layout.length, index))
    most = max(workers.gather(len(order))) if model.sharded else len(order)
    for start in range(0, most, size):
        yield order[start : start + size]
