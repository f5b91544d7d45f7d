"""Scores on held-out data: greedy answers compared with the response, choice by likelihood, perplexity of the response
and accuracy of its tokens, tasks of a harness, and a policy's success in a simulator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, cast

import torch

from craft_ray import interruption
from craft_ray.config import EvalSet, HarnessEvalSet, LikelihoodEvalSet, RolloutEvalSet, SampleEvalSet, TaskConfig
from craft_ray.data.cells import shown
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, DataError
from craft_ray.extras import require_lerobot
from craft_ray.models.base import Features, Model, evaluating
from craft_ray.models.capabilities import token_model
from craft_ray.models.features import FeatureCache
from craft_ray.pace import Pace
from craft_ray.run.harness import HarnessTasks
from craft_ray.run.judges import judge_of
from craft_ray.run.likelihood import likelihoods, passes
from craft_ray.workers import Workers

HIGHER_IS_BETTER = {
    "exact_match": True, "contains": True, "numeric": True, "regex": True, "rouge_l": True, "function": True,
    "choice": True, "perplexity": False, "token_accuracy": True, "lm_eval": True, "success": True,
}  # fmt: skip
OF_TEXT = ("perplexity", "token_accuracy")
"""Metrics of a text as a whole, whose samples are neither right nor wrong."""
GRADED = ("rouge_l", "function", "lm_eval")
"""Metrics that give each sample a score from 0 to 1, where others say whether it is right."""


@dataclass(frozen=True)
class Score:
    """A score on a held-out set, and the records that it is computed from."""

    metric: str
    value: float
    samples: int
    records: list[dict[str, Any]]
    """One for each sample: its id, for answers the prediction, and its outcome: `correct`, `score`, or of a text `nll`,
    `tokens` and `hits`. For an episode also `steps`, and for the first ones `film`, a PNG in base64."""
    details: dict[str, float] = field(default_factory=dict)
    """Further means over the samples. For choices: `margin`, the log-likelihood of the right choice minus that of the
    best wrong one, in nats. For several tasks of a harness: the score of each."""


def outcome(record: dict[str, Any]) -> float:
    """How right a sample is, from 0 to 1; not for a text."""
    return float(record["score"] if "score" in record else record["correct"])


def ratio(metric: str, score: float, reference: float) -> float | None:
    """A score as a fraction of a reference, where 1 is as good: score/reference, or its inverse where lower is better.
    None if the reference is zero."""
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
            ConfigError: the model is not a policy, or the simulator does not provide the observations that it needs.
        """
        ...

    def run(self, model: Model, rows: Sequence[int], workers: Workers) -> list[dict[str, Any]]:
        """The records of these episodes, which run in parallel.

        Args:
            workers: if the model is sharded, each of them runs episodes at the same time.
        """
        ...


def open_eval_set(eval_set: EvalSet, key: str) -> Source | Episodes | HarnessTasks:
    """The samples, tasks or episodes that a model is scored on.

    Raises:
        ConfigError: the metric needs a column that the config does not name, or a task that does not exist.
    """
    if isinstance(eval_set, HarnessEvalSet):
        return HarnessTasks(eval_set.harness, f"{key}.harness")
    if isinstance(eval_set, RolloutEvalSet):
        require_lerobot(f"{key} rolls out a policy")
        from craft_ray.lerobot.rollout import Rollouts

        return Rollouts(eval_set.rollout, f"{key}.rollout")
    source = open_source(eval_set.data, f"{key}.data")
    if source.features is not None and eval_set.metric not in OF_TEXT:
        raise ConfigError(
            f"{key}.metric is {eval_set.metric}, but {source.name} is a LeRobotDataset: its actions are scored by "
            f"perplexity, and a policy by success in a rollout"
        )
    if not source.has_responses or (eval_set.metric == "choice" and not source.has_choices):
        needed = "choices" if source.has_responses else "response"
        raise ConfigError(f"{key}.metric is {eval_set.metric}, but {key}.data.columns.{needed} names no column")
    judge_of(eval_set, key)  # a missing function is reported before anything starts
    return source


def source_identity(data: TaskConfig, model: Model) -> tuple[str, str]:
    """The key of a source's features in a feature cache. It leaves out `limit` where a row is the same however many are
    read."""
    drawn = getattr(data, "sample", None) is not None  # at random among the rows that the limit leaves
    return data.model_dump_json(exclude=set() if drawn else {"limit"}), model.sample_fingerprint()


class EvalData:
    """An evaluation set as a model reads it. Preprocessed samples are kept: a run may be scored on them often."""

    def __init__(
        self,
        model: Model,
        source: Source | Episodes | HarnessTasks,
        eval_set: EvalSet,
        features: FeatureCache | None = None,
    ) -> None:
        """
        Args:
            features: samples that earlier runs in this process have preprocessed.

        Raises:
            ConfigError: the model cannot read the data, or act in the simulator.
        """
        self.model = model
        self.of = source
        self.eval_set = eval_set
        identity: tuple[str, ...] = ()
        if isinstance(eval_set, SampleEvalSet):
            model.check_source(self.source)
            identity = source_identity(eval_set.data, model)
        else:
            cast("Episodes | HarnessTasks", source).check(model)
        self._features = (features or FeatureCache()).source(self._make, *identity)
        self.judge = judge_of(eval_set, "the held-out set")

    @property
    def source(self) -> Source:
        """The samples of every metric but lm_eval and success."""
        assert isinstance(self.eval_set, SampleEvalSet)
        return cast("Source", self.of)

    @property
    def harness(self) -> HarnessTasks:
        """The tasks of metric lm_eval."""
        assert isinstance(self.of, HarnessTasks)
        return self.of

    @property
    def episodes(self) -> Episodes:
        """The episodes of metric success."""
        assert isinstance(self.eval_set, RolloutEvalSet)
        return cast("Episodes", self.of)

    def question(self, row: int) -> Features:
        """The prompt of a row."""
        return self._features((row, None))

    def answered(self, row: int, response: str | None = None) -> Features:
        """The prompt with its own response, or with another, of which only the response is predicted. The response of
        a frame is its actions, which stay."""
        sample = self.source[row]
        own = "" if sample.frame is not None else sample.answer() if response is None else response
        return self._features((row, own))

    def prepare(self, row: int) -> None:
        """Preprocess everything that the score of a row needs.

        Raises:
            DataError: the row cannot be scored.
        """
        if self.eval_set.metric == "choice":
            for choice in _choices(self.source[row]):
                self.answered(row, choice)
        elif self.eval_set.metric in OF_TEXT:
            self.answered(row)
            if row < _replies(self.eval_set):
                self._asked(row)
        else:
            self._asked(row)
            model, sample = token_model(self.model), self.source[row]
            own = model.response_tokens(sample)
            if self.judge is not None:
                self.judge.check(model.answer_text(own, own), sample)

    def _asked(self, row: int) -> None:
        """Preprocess a prompt, and check that an answer to it can be generated."""
        assert isinstance(self.eval_set, SampleEvalSet)
        named = f"the prompt of {self.source[row].where}"
        token_model(self.model).check_continued(self.question(row), self.eval_set.max_new_tokens, named)

    def _make(self, key: tuple[int, str | None]) -> Features:
        row, response = key
        sample = self.source[row]
        if response is None:
            return self.model.preprocess(sample)
        model, sample = token_model(self.model), sample.answering(response)
        return model.preprocess(sample, model.response_tokens(sample))


@torch.no_grad()
def evaluate(data: EvalData, workers: Workers, pace: Pace | None = None) -> Score:
    """Score a model; each worker takes its share of the samples, and all workers get the result.

    Args:
        pace: reports how many samples are scored.
    """
    model, eval_set = data.model, data.eval_set
    mine = list(range(workers.rank, len(data.of), workers.world_size))
    own = len(mine)
    if model.sharded:  # every worker makes the same passes: one without a last row repeats the data's last
        mine += [len(data.of) - 1] * (-(-len(data.of) // workers.world_size) - own)
    special = {"choice": _choice, "success": _success, "lm_eval": _harness, **dict.fromkeys(OF_TEXT, _text)}
    score = special.get(eval_set.metric, _answers)
    records = []
    with evaluating(model.module):
        for start in range(0, len(mine), eval_set.batch_size):
            interruption.check()
            records += score(data, mine[start : start + eval_set.batch_size], workers)
            if pace is not None:
                pace.reached(len(records) * workers.world_size)
    if pace is not None:
        pace.end()
    shares = workers.gather(records[:own])
    everyone = [shares[i % workers.world_size][i // workers.world_size] for i in range(len(data.of))]
    if eval_set.metric in OF_TEXT:
        tokens = sum(record["tokens"] for record in everyone)
        if not tokens:
            raise DataError(
                f"{data.of.name}: the responses hold no token to predict: {eval_set.metric} needs at least one"
            )
        if eval_set.metric == "perplexity":
            value = _perplexity_of(sum(record["nll"] for record in everyone) / tokens, data.of.name)
        else:
            value = sum(record["hits"] for record in everyone) / tokens
    else:
        value = math.fsum(map(outcome, everyone)) / len(everyone)
    details: dict[str, float] = {}
    if eval_set.metric == "choice":
        details["margin"] = math.fsum(record["margin"] for record in everyone) / len(everyone)
    if isinstance(eval_set, HarnessEvalSet):
        details |= data.harness.means(everyone)
    return Score(eval_set.metric, value, len(everyone), everyone, details)


def _answers(data: EvalData, rows: Sequence[int], _: Workers) -> list[dict[str, Any]]:
    assert isinstance(data.eval_set, SampleEvalSet)
    model = token_model(data.model)
    answers = model.generate([data.question(row) for row in rows], data.eval_set.max_new_tokens)
    records = []
    for row, tokens in zip(rows, answers, strict=True):
        sample = data.source[row]
        own = model.response_tokens(sample)
        reply, expected = model.answer_text(tokens, own), model.answer_text(own, own)
        found = reply == expected if data.judge is None else data.judge(reply, expected, sample)
        records.append(_record(sample, model.decode(tokens).strip(), sample.answer().strip(), found))
    return records


def _choice(data: EvalData, rows: Sequence[int], workers: Workers) -> list[dict[str, Any]]:
    """The choices of all samples fill the forward passes together."""
    samples = [data.source[row] for row in rows]
    asked = [
        data.answered(row, choice) for row, sample in zip(rows, samples, strict=True) for choice in _choices(sample)
    ]
    found = [math.nan] * len(asked)
    for indices in passes(data.model, asked, data.eval_set.batch_size, workers):
        chosen = [asked[index] for index in indices] or asked[:1]
        for index, one in zip(indices, likelihoods(data.model, chosen), strict=False):
            found[index] = one.total
    totals, records = iter(found), []
    for sample in samples:
        choices, response = _choices(sample), sample.answer()
        own = list(islice(totals, len(choices)))
        if any(map(math.isnan, own)):
            raise DataError(
                f"{sample.where}: the likelihood of a choice is not a number: the model's weights are broken, or its "
                f"training has diverged (lower train.learning_rate)"
            )
        prediction = choices[max(range(len(choices)), key=own.__getitem__)]
        wrong = [value for choice, value in zip(choices, own, strict=True) if choice != response]
        margin = own[choices.index(response)] - max(wrong)
        records.append(_record(sample, prediction, response, prediction == response) | {"margin": margin})
    return records


def _choices(sample: Sample) -> tuple[str, ...]:
    """
    Raises:
        DataError: there is no wrong choice, or not exactly one right choice.
    """
    choices = sample.choices or ()
    if sample.response not in choices:
        raise DataError(
            f"{sample.where}: its response {shown(sample.response)} is not one of its choices {shown(list(choices))}"
        )
    if len(choices) == 1:
        raise DataError(
            f"{sample.where} has only the choice {shown(choices[0])}: add a wrong one, or remove the sample"
        )
    if choices.count(sample.response) > 1:
        raise DataError(
            f"{sample.where}: its response {shown(sample.response)} appears more than once among its choices "
            f"{shown(list(choices))}: keep it once"
        )
    return choices


def _text(data: EvalData, rows: Sequence[int], workers: Workers) -> list[dict[str, Any]]:
    found = likelihoods(data.model, [data.answered(row) for row in rows])
    records: list[dict[str, Any]] = [
        {"id": data.source[row].id, "nll": -one.total, "tokens": one.tokens, "hits": one.hits}
        for row, one in zip(rows, found, strict=True)
    ]
    asked = [data.question(row) for row in rows if row < _replies(data.eval_set)]
    own = len(asked)
    if data.model.sharded:  # a worker that has less to ask makes the others' passes
        asked += [data.question(rows[0])] * (max(workers.gather(len(asked))) - len(asked))
    if asked:
        assert isinstance(data.eval_set, SampleEvalSet)
        model = token_model(data.model)
        answers = model.generate(asked, data.eval_set.max_new_tokens)
        for record, tokens in zip(records[:own], answers[:own], strict=True):  # rows ascend: the first were asked
            record["prediction"] = model.decode(tokens).strip()
    return records


def _replies(eval_set: EvalSet) -> int:
    return eval_set.replies if isinstance(eval_set, LikelihoodEvalSet) else 0


def _perplexity_of(nats: float, name: str) -> float:
    """exp of the mean negative log-likelihood of a token.

    Raises:
        DataError: it is not a number, or too large for one.
    """
    try:
        value = math.exp(nats)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise DataError(
            f"{name}: the perplexity of the responses is beyond every number, at {nats:.0f} nats a token: the model "
            f"does not fit these data, or its training has diverged (lower train.learning_rate)"
        )
    return value


def _harness(data: EvalData, rows: Sequence[int], workers: Workers) -> list[dict[str, Any]]:
    return data.harness.run(data.model, rows, data.eval_set.batch_size, workers)


def _success(data: EvalData, rows: Sequence[int], workers: Workers) -> list[dict[str, Any]]:
    return data.episodes.run(data.model, rows, workers)


def _record(sample: Sample, prediction: str, response: str, found: bool | float) -> dict[str, Any]:
    return {
        "id": sample.id,
        "prompt": sample.prompt,
        "response": response,
        "prediction": prediction,
        "correct" if isinstance(found, bool) else "score": found,
    }
