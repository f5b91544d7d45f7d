"""The model card of made-up runs: its head for the hub, and what it says of each kind of run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from craft_ray.config import dump_config
from craft_ray.report.card import CardFields, model_card
from craft_ray.report.card_data import data_uses
from craft_ray.report.runs import read_runs
from craft_ray.run.folder import RunFolder
from tests.support.reports import write_run

HUB = {"model.path": "org/teacher", "task.path": "org/new", "task.split": "train[:90%]"}


def card_of(run: RunFolder, fields: CardFields | None = None) -> ModelCard:
    """The card, written and read back."""
    (finished,) = read_runs([run])
    return ModelCard(str(model_card(finished, "kept", fields or CardFields())))


def changed(run: RunFolder, config: Mapping[str, Any], **result: Any) -> RunFolder:
    (run.path / "config.yaml").write_text(dump_config(run.config().changed(dict(config))))
    found = run.finished()
    assert found is not None
    for key, value in result.items():
        found[key] = {**found[key], **value} if isinstance(found.get(key), dict) else value
    (run.path / "result.json").write_text(json.dumps(found))
    return run


def test_names_on_the_hub_are_given_and_all_else_by_its_last_part(tmp_path: Path) -> None:
    run = changed(write_run(tmp_path / "very" / "private", "hidden", 0), HUB)
    card = card_of(run, CardFields("other", "My licence", "https://example.org/licence"))
    assert (card.data.base_model, card.data.datasets) == ("org/teacher", ["org/new"])
    licence = (card.data.license, card.data.license_name, card.data.license_link)
    assert licence == ("other", "My licence", "https://example.org/licence")
    assert "All weights of org/teacher, weights `feedc0de`" in card.text
    assert "[org/new](https://huggingface.co/datasets/org/new), split `train[:90%]`" in card.text
    assert "`old.parquet`, not public" in card.text
    assert "private/" not in str(card)
    assert str(tmp_path) not in str(card)


def test_the_certificate_stands_in_words(tmp_path: Path) -> None:
    certificate = {
        "keep": 0.95, "kept": 0.97, "kept_low": 0.955, "kept_high": 0.99, "verdict": "met", "samples": 400,
        "samples_to_decide": None, "confidence": 0.95,
    }  # fmt: skip
    card = card_of(changed(write_run(tmp_path, "hidden", 0), {}, certificate=certificate, feasible=True, lambda_max=10))
    assert "keep 95% of the old skill: met; 97.0% kept on 400 samples, at least 95.5% at 95% confidence" in card.text
    assert "| old | exact match | 80.0 % | 40.0 % | 50.0 % | 20 |" in card.text


@pytest.mark.parametrize("metric", ["exact_match", "perplexity", "token_accuracy", "success"])
def test_every_metric_is_in_the_head_unless_it_overflowed(metric: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, "baseline", 0, metric=metric, predictions=False)
    found = {entry.dataset_config: entry for entry in card_of(run).data.eval_results}
    assert [(entry.metric_type, entry.metric_value) for entry in found.values()] == [(metric, 0.4), (metric, 0.9)]
    changed(run, {}, new={"after": math.inf})
    assert [entry.dataset_config for entry in card_of(run).data.eval_results] == ["old"]


def test_a_run_without_scores_has_a_card(tmp_path: Path) -> None:
    card = card_of(write_run(tmp_path, "hidden", 0, old=None, new=None))
    assert card.data.eval_results is None
    assert "retention loss 0.04 on 50 held-out anchors, budget 0.05: met" in card.text


@pytest.mark.parametrize(
    ("changes", "library", "task", "words"),
    [
        ({}, "transformers", "text-generation", "AutoModelForCausalLM.from_pretrained("),
        ({"model.kind": "vision_language"}, "transformers", "image-text-to-text", "AutoModelForImageTextToText.from_"),
        ({"adapter": {"r": 2}}, "peft", "text-generation", "needs peft"),
        ({"model.kind": "lerobot"}, "lerobot", "robotics", "folder = snapshot_download("),
    ],
)
def test_each_kind_of_model_says_how_it_loads(
    changes: dict[str, Any], library: str, task: str, words: str, tmp_path: Path
) -> None:
    card = card_of(changed(write_run(tmp_path, "hidden", 0, metric="success", predictions=False), changes))
    assert (card.data.library_name, card.data.pipeline_tag) == (library, task)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code, "card", "exec")
    assert words in code


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (
            "craft-ray train /home/me/run.yaml seed=1",
            "```\ncraft-ray anchors build run.yaml seed=1\ncraft-ray train run.yaml seed=1\n```",
        ),
        ("craft-ray train --resume /home/me/runs/a", "```\ncraft-ray train --resume a\n```"),
        ("craft-ray compare run.yaml", "```\ncraft-ray compare run.yaml\n```"),
    ],
)
def test_the_command_stands_behind_the_one_that_builds_its_cache(command: str, told: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, "hidden", 0)
    environment = json.loads((run.path / "env.json").read_text())
    (run.path / "env.json").write_text(json.dumps(environment | {"command": command.split()}))
    assert "anchors build" not in card_of(run).text, "its config has no anchors: the cache is another's"
    assert told in card_of(changed(run, {"anchors": {"source": {"path": "org/old"}}})).text


def test_each_use_of_data_is_listed(tmp_path: Path) -> None:
    scored = {"metric": "choice", "data": {"path": "org/scored", "columns": {"choices": "c", "answer_index": "a"}}}
    skill = {"anchors": {"path": "/data/anchors.parquet"}, "evaluation": scored}
    config = write_run(tmp_path, "hidden", 0).config().changed(
        {
            "task": {"mix": [{"path": "org/a"}, {"path": "s3://bucket/b.jsonl", "limit": 5}]},
            "evaluation.old": None, "skills": {"drawing": skill},
        }
    )  # fmt: skip
    uses = [(use.skill, use.path, use.public, use.scored, use.limit) for use in data_uses(config)]
    assert uses == [
        ("new", "org/a", True, False, None),
        ("new", "b.jsonl", False, False, 5),
        ("drawing", "anchors.parquet", False, False, None),
        ("drawing", "org/scored", True, True, None),
        ("new", "old.parquet", False, True, None),
    ]


def test_tasks_of_a_harness_are_listed_by_their_names(tmp_path: Path) -> None:
    scored = {"metric": "lm_eval", "harness": {"tasks": ["cups", "sums"], "include_path": "/private/tasks", "limit": 9}}
    config = write_run(tmp_path, "hidden", 0).config().changed({"evaluation.new": scored})
    (use,) = [use for use in data_uses(config) if use.scored and use.skill == "new"]
    assert (use.path, use.public, use.limit) == ("cups, sums", False, 9)
