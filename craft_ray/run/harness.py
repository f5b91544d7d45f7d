"""Tasks of EleutherAI's lm-evaluation-harness as a source of scores: their documents by number.

The harness reads the tasks, writes the prompts, filters the replies and scores each document; the live model answers
(harness_requests.py). All requests are made in the order of the documents before any is answered, so that solved
examples in the prompts do not depend on which worker asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from craft_ray.config import HarnessConfig
from craft_ray.data.cells import cut, shown
from craft_ray.errors import ConfigError, DataError, first_line
from craft_ray.extras import install, missing
from craft_ray.models.base import Model
from craft_ray.models.causal_lm import CausalLM
from craft_ray.run.harness_requests import Continuation, Prompt, log_likelihoods, replies
from craft_ray.workers import Workers

SEED = 1234
"""The harness's own seed for the choice of solved examples."""
ELSEWHERE = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")
"""Settings of a task that say where its documents and its file are, and not what they are."""


class Measure(NamedTuple):
    """What counts in a task: one of its metrics, after one of its filters."""

    metric: str
    filter: str


class Document(NamedTuple):
    """A document of a task, and what is asked about it."""

    task: Any
    measure: Measure
    name: str
    requests: list[Any]


class HarnessTasks:
    """The documents of all tasks of a configuration.

    Args:
        key: the section's key in the configuration, for errors.

    Raises:
        ConfigError: the harness is not installed, a task does not load, or it has no such metric.
    """

    def __init__(self, config: HarnessConfig, key: str) -> None:
        lacking = missing("lm_eval")
        if lacking:
            raise ConfigError(f"{key} names tasks of the lm-evaluation-harness, but {lacking}: {install('lm-eval')}")
        self._config, self._key = config, key
        self.tasks = _loaded(config, key)
        self.measures = {name: self._measure(name, task) for name, task in self.tasks.items()}
        self.name = f"lm_eval {', '.join(config.tasks)}"
        self._documents: list[Document] = []

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all requests, of the documents with their answers, and of how they are scored."""
        assert self._documents, "the requests are made for a model"
        digest = blake3(f"lm_eval {version('lm_eval')}".encode())
        for name, task in self.tasks.items():
            how = {
                key: value for key, value in task.dump_config().items() if not key.startswith(("dataset", "metadata"))
            }
            digest.update(json.dumps([name, self.measures[name], how], sort_keys=True, default=str).encode())
        for document in self._documents:
            asked = [[request.request_type, request.arguments] for request in document.requests]
            digest.update(json.dumps([document.name, asked, document.requests[0].doc], default=str).encode())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._documents)

    def check(self, model: Model) -> None:
        """Make all requests.

        Raises:
            ConfigError: the model is not a language model.
            DataError: a task asks for what cannot be answered.
        """
        if not isinstance(model, CausalLM):
            raise ConfigError(
                f"{self._key} scores texts, and {model.description} is none that reads texts alone: choose another "
                f"metric, or model.kind=causal_lm"
            )
        if not self._documents:  # models of a run share a tokenizer and a chat template
            for name, task in self.tasks.items():
                self._documents += self._asked(name, task, model)

    def run(self, model: Model, rows: Sequence[int], size: int, workers: Workers) -> list[dict[str, Any]]:
        """The records of these documents: `id`, `score`, and what was asked, expected and answered.

        Args:
            size: requests in a forward pass.

        Raises:
            DataError: a prompt is too long, or a score is not one from 0 to 1.
        """
        assert isinstance(model, CausalLM)
        # Copies, because the harness writes the answers into the requests.
        asked = {row: [_fresh(request) for request in self._documents[row].requests] for row in rows}
        named = [(request, self._documents[row].name) for row, requests in asked.items() for request in requests]
        compared = [each for each in named if each[0].request_type == "loglikelihood"]
        prompted = [each for each in named if each[0].request_type == "generate_until"]
        continuations = [Continuation(request.args[0], request.args[1], name) for request, name in compared]
        prompts = [Prompt(request.args[0], request.args[1], name) for request, name in prompted]
        answers: list[Any] = [
            *log_likelihoods(model, continuations, size, workers),
            *replies(model, prompts, size, workers),
        ]
        for (request, _), answer in zip([*compared, *prompted], answers, strict=True):
            request.resps = [answer] * (request.repeats or 1)  # what is greedy is repeated exactly
        return [self._record(self._documents[row], requests) for row, requests in asked.items()]

    def _record(self, document: Document, requests: list[Any]) -> dict[str, Any]:
        task, (metric, name_of_filter) = document.task, document.measure
        for ensemble in task._filters:
            if ensemble.name == name_of_filter:
                ensemble.apply(requests)
        given = [request.filtered_resps[name_of_filter] for request in requests]
        doc = requests[0].doc
        scores = task.process_results(doc, given)
        score = scores.get(metric)
        if not isinstance(score, Real) or not 0 <= float(score) <= 1:
            raise DataError(
                f"{self._key}.metric {metric} gives {shown(score)} for {document.name}, and only scores from 0 to 1 of "
                f"each document are compared: choose another metric of the task ({', '.join(scores)})"
            )
        target = task.doc_to_target(doc)
        if requests[0].request_type == "loglikelihood":
            best = max(range(len(given)), key=lambda index: given[index][0])
            prediction = requests[best].args[1] if len(given) > 1 else ""
            if isinstance(target, int) and 0 <= target < len(requests):
                target = requests[target].args[1]
        else:
            prediction = str(given[0])
        return {
            "id": document.name,
            "prompt": requests[0].args[0],
            "response": str(target).strip(),
            "prediction": prediction.strip(),
            "score": float(score),
        }

    def means(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The mean of each task, where there are several."""
        scores: dict[str, list[float]] = {}
        for record in records:
            scores.setdefault(record["id"].rpartition("/")[0], []).append(record["score"])
        return {name: math.fsum(own) / len(own) for name, own in scores.items()} if len(scores) > 1 else {}

    def _measure(self, name: str, task: Any) -> Measure:
        """The metric and the filter of a task that count."""
        from lm_eval.api.registry import get_aggregation

        filters = [ensemble.name for ensemble in task._filters]
        known = list(task.aggregation())
        asked, _, filtered = (self._config.metric or known[0]).partition(",")
        if asked not in known or filtered not in ("", *filters):
            raise ConfigError(
                f"{self._key}.metric is {self._config.metric}, but the task {name} has the metrics {', '.join(known)} "
                f"with the filters {', '.join(filters)}: choose one of them"
            )
        if task.aggregation()[asked] is not get_aggregation("mean") or not task.higher_is_better().get(asked, True):
            raise ConfigError(
                f"{self._key}.metric {asked} of the task {name} is not a mean over its documents where higher is "
                f"better: choose another of its metrics ({', '.join(known)}), or for texts metric: perplexity"
            )
        return Measure(asked, filtered or filters[0])

    def _asked(self, name: str, task: Any, model: CausalLM) -> list[Document]:
        """The documents of a task with their requests."""
        chat = None if model.chat is None else _chat_template(model, name)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a bar
                task.build_all_requests(
                    limit=self._config.limit,
                    apply_chat_template=chat is not None,
                    fewshot_as_multiturn=chat is not None,
                    chat_template=chat,
                )
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self._key}: the task {name} makes no requests of its documents "
                f"({type(error).__name__}: {cut(first_line(error))}): correct the task file"
            ) from None
        of: dict[int, list[Any]] = {}
        for request in task.instances:
            of.setdefault(request.doc_id, []).append(request)
        for request in task.instances:
            if request.request_type not in ("loglikelihood", "generate_until"):
                raise ConfigError(
                    f"{self._key}: the task {name} asks for {request.request_type}, the likelihood of whole texts: "
                    f"score them by metric: perplexity"
                )
        measure = self.measures[name]
        return [
            Document(task, measure, f"{name}/{number}", sorted(requests, key=lambda request: request.idx))
            for number, requests in of.items()
        ]


def _loaded(config: HarnessConfig, key: str) -> dict[str, Any]:
    """The tasks by name.

    Raises:
        ConfigError: there is no such task, or it does not load.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its notices are for those who write tasks
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise ConfigError(f"{key}.include_path is {config.include_path}, and there is no such folder: correct it")
    if not Path(config.folder).is_dir():
        raise ConfigError(f"{key}.folder is {config.folder}, and there is no such folder: correct it")
    # Only task files of one's own have data in it; the harness's fetch theirs.
    if config.include_path is not None and _is_pattern(os.path.realpath(config.folder)):
        raise ConfigError(
            f"{key}.folder is {config.folder}, and Hugging Face datasets takes [ ] * ? :: in the path of a task's data "
            f"for a pattern: rename the folder, or start the command in another one"
        )
    manager = TaskManager(include_path=config.include_path, include_defaults=False)
    own = manager.all_tasks
    if any(task not in own for task in config.tasks):  # reading the harness's own tasks takes half a minute
        manager = TaskManager(include_path=config.include_path)
    for task in config.tasks:
        if task not in manager.task_index:
            where = "" if config.include_path is None else f" and {config.include_path} has {', '.join(own) or 'none'}"
            raise ConfigError(f"{key}.tasks names '{task}', which is no task of lm_eval {version('lm_eval')}{where}")
    found: dict[str, Any] = {}
    # Relative paths of data in a task file start from the working directory, which a worker does not have.
    with contextlib.chdir(config.folder):
        for task in config.tasks:
            try:
                found |= manager.load([task])["tasks"]
            except Exception as error:
                raise ConfigError(
                    f"{key}.tasks: '{task}' does not load ({type(error).__name__}: {cut(first_line(error))})"
                ) from None
    for name, task in found.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = (
                "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "shows pictures or sounds"
            )
            raise ConfigError(f"{key}.tasks: '{name}' {what}, which is not supported: choose another task")
        if config.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # a task's own 0 stays
            task.set_config("num_fewshot", config.num_fewshot)
        task.set_fewshot_seed(SEED)
    return found


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) or "::" in path


def _chat_template(model: CausalLM, name: str) -> Any:
    """What the harness writes a conversation with."""

    def written(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return str(
                model.tokenizer.apply_chat_template(
                    history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except Exception as error:
            raise DataError(
                f"the chat template of {model.config.path} does not write a prompt of the task {name} "
                f"({cut(first_line(error))}): set model.chat_template=false, or correct one of them"
            ) from None

    return written


def _fresh(request: Any) -> Any:
    """A request without answers."""
    return dataclasses.replace(request, resps=[], filtered_resps={})
