"""Scores on held-out data: exact match of the greedy answer, choice by likelihood, perplexity of the response; and of
policies the success in a simulator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, cast

import torch

from craft_ray.config import DataConfig, EvalSet
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, DataError
from craft_ray.extras import require_lerobot
from craft_ray.models.base import IGNORE, Features, Model
from craft_ray.models.features import FeatureCache
from craft_ray.workers import Workers

HIGHER_IS_BETTER = {"exact_match": True, "choice": True, "perplexity": False, "success": True}


@dataclass(frozen=True)
class Score:
    """A number on a held-out set, and what it is made of."""

    metric: str
    value: float
    samples: int
    records: list[dict[str, Any]]
    """One for each sample: its id and outcome, and for answers the prediction. For an episode: `correct`, `steps`, and
    of the first ones `film`, a PNG in base64."""
    details: dict[str, float] = field(default_factory=dict)
    """Further means over the samples. Of choices: `margin`, the log-likelihood of the right one less that of the best
    wrong one, in nats."""


def ratio(metric: str, score: float, reference: float) -> float | None:
    """A score as part of a reference, 1 being as good: score/reference, or its inverse where lower is better.
    None where the reference is zero."""
    if HIGHER_IS_BETTER[metric]:
        return score / reference if reference else None
    return reference / score


class Episodes(Protocol):
    """Episodes in a simulator by number, as a source of scores (craft_ray.lerobot.rollout)."""

    name: str

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def check(self, model: Model) -> None:
        """
        Raises:
            ConfigError: the model is no policy, or the simulator does not show what it looks at.
        """
        ...

    def run(self, model: Model, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The records of these episodes, which go on side by side."""
        ...


def open_eval_set(eval_set: EvalSet, key: str) -> Source | Episodes:
    """What a model is scored on.

    Raises:
        ConfigError: the metric needs a column that the config does not name.
    """
    if eval_set.rollout is not None:
        require_lerobot(f"{key} rolls out a policy")
        from craft_ray.lerobot.rollout import Rollouts

        return Rollouts(eval_set.rollout, f"{key}.rollout")
    assert eval_set.data is not None
    source = open_source(eval_set.data, f"{key}.data")
    if source.features is not None and eval_set.metric != "perplexity":
        raise ConfigError(
            f"{key}.metric is {eval_set.metric}, but {source.name} is a LeRobotDataset: its actions are scored by "
            f"perplexity, and a policy by success in a rollout"
        )
    if not source.has_responses or (eval_set.metric == "choice" and eval_set.data.columns.choices is None):
        needed = "choices" if source.has_responses else "response"
        raise ConfigError(f"{key}.metric is {eval_set.metric}, but {key}.data.columns.{needed} names no column")
    return source


def source_identity(data: DataConfig, model: Model) -> tuple[str, str]:
    """By what the features of a source are known in a feature cache. Rows are the same however many are read."""
    return data.model_dump_json(exclude={"limit"}), model.preprocessor_fingerprint()


class EvalData:
    """An evaluation set as a model reads it. What was preprocessed is kept: a run may look at it often."""

    def __init__(
        self, model: Model, source: Source | Episodes, eval_set: EvalSet, features: FeatureCache | None = None
    ) -> None:
        """
        Args:
            features: what earlier runs in this process have preprocessed.

        Raises:
            ConfigError: the model cannot read the data, or act in the simulator.
        """
        self.model = model
        self.of = source
        self.eval_set = eval_set
        if eval_set.rollout is None:
            model.check_source(self.source)
        else:
            self.episodes.check(model)
        identity = () if eval_set.data is None else source_identity(eval_set.data, model)
        self._features = (features or FeatureCache()).source(self._make, *identity)

    @property
    def source(self) -> Source:
        """The samples of every metric but success."""
        assert self.eval_set.rollout is None
        return cast("Source", self.of)

    @property
    def episodes(self) -> Episodes:
        """The episodes of metric success."""
        assert self.eval_set.rollout is not None
        return cast("Episodes", self.of)

    def question(self, row: int) -> Features:
        """The prompt of a row."""
        return self._features((row, None))

    def answered(self, row: int, response: str | None = None) -> Features:
        """The prompt with its own response, or with another."""
        return self._features((row, str(self.source[row].response) if response is None else response))

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
    model, eval_set = data.model, data.eval_set
    mine = range(workers.rank, len(data.of), workers.world_size)
    score = {"exact_match": _exact_match, "choice": _choice, "perplexity": _perplexity, "success": _success}[
        eval_set.metric
    ]
    was_training = model.module.training
    model.module.eval()
    try:
        records = []
        for start in range(0, len(mine), eval_set.batch_size):
            records += score(data, mine[start : start + eval_set.batch_size])
    finally:
        model.module.train(was_training)
    shares = workers.gather(records)
    everyone = [shares[i % workers.world_size][i // workers.world_size] for i in range(len(data.of))]
    if eval_set.metric == "perplexity":
        tokens = sum(record["tokens"] for record in everyone)
        if not tokens:
            raise DataError(f"{data.of.name}: the responses hold no token to predict: perplexity needs some")
        value = math.exp(sum(record["nll"] for record in everyone) / tokens)
    else:
        value = sum(record["correct"] for record in everyone) / len(everyone)
    details = {}
    if eval_set.metric == "choice":
        details["margin"] = math.fsum(record["margin"] for record in everyone) / len(everyone)
    return Score(eval_set.metric, value, len(everyone), everyone, details)


def _exact_match(data: EvalData, rows: Sequence[int]) -> list[dict[str, Any]]:
    answers = data.model.generate([data.question(row) for row in rows], data.eval_set.max_new_tokens)
    records = []
    for row, tokens in zip(rows, answers, strict=True):
        sample = data.source[row]
        records.append(_record(sample, data.model.decode(tokens).strip(), str(sample.response).strip()))
    return records


def _choice(data: EvalData, rows: Sequence[int]) -> list[dict[str, Any]]:
    """The choices of all samples fill the forward passes together; those of similar length share one, for padding is
    computed, too."""
    samples = [data.source[row] for row in rows]
    asked = [
        data.answered(row, choice) for row, sample in zip(rows, samples, strict=True) for choice in _choices(sample)
    ]
    order = sorted(range(len(asked)), key=lambda place: (asked[place].layout.length, place))
    size, found = data.eval_set.batch_size, [math.nan] * len(asked)
    for start in range(0, len(order), size):
        places = order[start : start + size]
        likelihoods = _log_likelihoods(data.model, [asked[place] for place in places])
        for place, (total, _) in zip(places, likelihoods, strict=True):
            found[place] = total
    totals, records = iter(found), []
    for sample in samples:
        choices, response = _choices(sample), str(sample.response)
        own = list(islice(totals, len(choices)))
        prediction = choices[max(range(len(choices)), key=own.__getitem__)]
        wrong = [value for choice, value in zip(choices, own, strict=True) if choice != response]
        margin = own[choices.index(response)] - max(wrong)
        records.append(_record(sample, prediction, response) | {"margin": margin})
    return records


def _choices(sample: Sample) -> tuple[str, ...]:
    """
    Raises:
        DataError: there is no wrong one, or not one right one, among them.
    """
    choices = sample.choices or ()
    if sample.response not in choices:
        raise DataError(f"sample {sample.id}: its response '{sample.response}' is none of its choices {list(choices)}")
    if len(choices) == 1:
        raise DataError(f"sample {sample.id} has the one choice '{choices[0]}': add a wrong one, or remove the sample")
    if choices.count(sample.response) > 1:
        raise DataError(
            f"sample {sample.id}: its response '{sample.response}' stands more than once among its choices "
            f"{list(choices)}: leave it there once"
        )
    return choices


def _perplexity(data: EvalData, rows: Sequence[int]) -> list[dict[str, Any]]:
    found = _log_likelihoods(data.model, [data.answered(row) for row in rows])
    return [
        {"id": data.source[row].id, "nll": -total, "tokens": count}
        for row, (total, count) in zip(rows, found, strict=True)
    ]


def _success(data: EvalData, rows: Sequence[int]) -> list[dict[str, Any]]:
    return data.episodes.run(data.model, rows)


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
