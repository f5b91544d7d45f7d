"""Scores on held-out data: exact match of the greedy answer, choice by likelihood, perplexity of the response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from craft_ray.config import EvalSet
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, DataError
from craft_ray.models.base import IGNORE, Features, Model
from craft_ray.workers import Workers

HIGHER_IS_BETTER = {"exact_match": True, "choice": True, "perplexity": False}


@dataclass(frozen=True)
class Score:
    """A number on a held-out set, and what it is made of."""

    metric: str
    value: float
    samples: int
    records: list[dict[str, Any]]
    """One for each sample: its id and outcome, and for answers the prediction."""


def ratio(metric: str, score: float, reference: float) -> float | None:
    """A score as part of a reference, 1 being as good: score/reference, or its inverse where lower is better.
    None where the reference is zero."""
    if HIGHER_IS_BETTER[metric]:
        return score / reference if reference else None
    return reference / score


def open_eval_set(eval_set: EvalSet, key: str) -> Source:
    """The samples of an evaluation set.

    Raises:
        ConfigError: the metric needs a column that the config does not name.
    """
    columns = eval_set.data.columns
    if columns.response is None or (eval_set.metric == "choice" and columns.choices is None):
        needed = "response" if columns.response is None else "choices"
        raise ConfigError(f"{key}.metric is {eval_set.metric}, but {key}.data.columns.{needed} names no column")
    return open_source(eval_set.data, f"{key}.data")


@torch.inference_mode()
def evaluate(model: Model, source: Source, eval_set: EvalSet, workers: Workers) -> Score:
    """Score a model; every worker takes its share of the samples, and all get the result."""
    mine = range(workers.rank, len(source), workers.world_size)
    score = {"exact_match": _exact_match, "choice": _choice, "perplexity": _perplexity}[eval_set.metric]
    was_training = model.module.training
    model.module.eval()
    try:
        records = []
        for start in range(0, len(mine), eval_set.batch_size):
            samples = [source[row] for row in mine[start : start + eval_set.batch_size]]
            records += score(model, samples, eval_set)
    finally:
        model.module.train(was_training)
    shares = workers.gather(records)
    everyone = [shares[i % workers.world_size][i // workers.world_size] for i in range(len(source))]
    if eval_set.metric == "perplexity":
        tokens = sum(record["tokens"] for record in everyone)
        if not tokens:
            raise DataError(f"{source.name}: the responses hold no token to predict: perplexity needs some")
        value = math.exp(sum(record["nll"] for record in everyone) / tokens)
    else:
        value = sum(record["correct"] for record in everyone) / len(everyone)
    return Score(eval_set.metric, value, len(everyone), everyone)


def _exact_match(model: Model, samples: Sequence[Sample], eval_set: EvalSet) -> list[dict[str, Any]]:
    answers = model.generate([model.preprocess(s) for s in samples], eval_set.max_new_tokens)
    records = []
    for sample, tokens in zip(samples, answers, strict=True):
        prediction, response = model.decode(tokens).strip(), str(sample.response).strip()
        records.append(_record(sample, prediction, response))
    return records


def _choice(model: Model, samples: Sequence[Sample], eval_set: EvalSet) -> list[dict[str, Any]]:
    records = []
    for sample in samples:
        choices = sample.choices or ()
        if sample.response not in choices:
            raise DataError(
                f"sample {sample.id}: its response '{sample.response}' is none of its choices {list(choices)}"
            )
        options = [Sample(sample.id, sample.prompt, sample.image, choice) for choice in choices]
        features = [model.preprocess(option, model.response_tokens(option)) for option in options]
        likelihoods = [total for total, _ in _log_likelihoods(model, features)]
        prediction = choices[max(range(len(choices)), key=likelihoods.__getitem__)]
        records.append(_record(sample, prediction, str(sample.response)))
    return records


def _perplexity(model: Model, samples: Sequence[Sample], eval_set: EvalSet) -> list[dict[str, Any]]:
    features = [model.preprocess(sample, model.response_tokens(sample)) for sample in samples]
    return [
        {"id": sample.id, "nll": -total, "tokens": count}
        for sample, (total, count) in zip(samples, _log_likelihoods(model, features), strict=True)
    ]


def _log_likelihoods(model: Model, features: Sequence[Features]) -> list[tuple[float, int]]:
    """Log-likelihood of each suffix in nats, and its number of tokens."""
    batch = model.collate(features).to(model.device)
    log_probs, _ = model.token_log_probs(batch)
    counts = (batch.targets_BP != IGNORE).sum(1).tolist()
    return list(zip(log_probs.double().sum(1).tolist(), counts, strict=True))


def _record(sample: Sample, prediction: str, response: str) -> dict[str, Any]:
    return {
        "id": sample.id,
        "prompt": sample.prompt,
        "response": response,
        "prediction": prediction,
        "correct": prediction == response,
    }
