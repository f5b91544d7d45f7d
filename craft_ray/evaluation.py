"""Scores on held-out data: exact match of the greedy answer, choice by likelihood, perplexity of the response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from craft_ray.config import EvalSet
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, DataError
from craft_ray.models.base import IGNORE, Features, Model
from craft_ray.models.features import FeatureCache, Shelf
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


class EvalData:
    """An evaluation set as a model reads it. What was preprocessed is kept: a run may look at it often."""

    def __init__(self, model: Model, source: Source, eval_set: EvalSet, shelf: Shelf | None = None) -> None:
        self.model = model
        self.source = source
        self.eval_set = eval_set
        self._kept = FeatureCache[tuple[int, str | None]](self._make, shelf)

    def question(self, row: int) -> Features:
        """The prompt of a row."""
        return self._kept[row, None]

    def answered(self, row: int, response: str | None = None) -> Features:
        """The prompt with its own response, or with another."""
        return self._kept[row, str(self.source[row].response) if response is None else response]

    def _make(self, key: tuple[int, str | None]) -> Features:
        row, response = key
        sample = self.source[row]
        if response is None:
            return self.model.preprocess(sample)
        sample = replace(sample, response=response)
        return self.model.preprocess(sample, self.model.response_tokens(sample))


@torch.inference_mode()
def evaluate(data: EvalData, workers: Workers) -> Score:
    """Score a model; every worker takes its share of the samples, and all get the result."""
    model, source, eval_set = data.model, data.source, data.eval_set
    mine = range(workers.rank, len(source), workers.world_size)
    score = {"exact_match": _exact_match, "choice": _choice, "perplexity": _perplexity}[eval_set.metric]
    was_training = model.module.training
    model.module.eval()
    try:
        records = []
        for start in range(0, len(mine), eval_set.batch_size):
            records += score(data, mine[start : start + eval_set.batch_size])
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


def _exact_match(data: EvalData, rows: Sequence[int]) -> list[dict[str, Any]]:
    answers = data.model.generate([data.question(row) for row in rows], data.eval_set.max_new_tokens)
    records = []
    for row, tokens in zip(rows, answers, strict=True):
        sample = data.source[row]
        records.append(_record(sample, data.model.decode(tokens).strip(), str(sample.response).strip()))
    return records


def _choice(data: EvalData, rows: Sequence[int]) -> list[dict[str, Any]]:
    records = []
    for row in rows:
        sample = data.source[row]
        choices = sample.choices or ()
        if sample.response not in choices:
            raise DataError(
                f"sample {sample.id}: its response '{sample.response}' is none of its choices {list(choices)}"
            )
        likelihoods = [total for total, _ in _log_likelihoods(data.model, [data.answered(row, c) for c in choices])]
        prediction = choices[max(range(len(choices)), key=likelihoods.__getitem__)]
        records.append(_record(sample, prediction, str(sample.response)))
    return records


def _perplexity(data: EvalData, rows: Sequence[int]) -> list[dict[str, Any]]:
    found = _log_likelihoods(data.model, [data.answered(row) for row in rows])
    return [
        {"id": data.source[row].id, "nll": -total, "tokens": count}
        for row, (total, count) in zip(rows, found, strict=True)
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
