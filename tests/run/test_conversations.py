"""Conversations through every stage: the cache, a run under its budget, and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from craft_pipelines.anchors import build

from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.reader import open_anchors
from craft_ray.config import Experiment, parse_config
from craft_ray.data.source import open_source
from craft_ray.models import load_model
from craft_ray.models.capabilities import token_model
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker
from tests.support.caches import json_lines
from tests.support.tokenizers import TOKENIZERS, chat_model


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


TASK = [said("Name a color.", "Red.", f"And number {n}?", f"Blue {n}.") for n in range(8)]
OLD = [said("Hello there", "Hello.", f"How are you, {n}?", "Fine.") for n in range(6)] + [said("Who is there?")]


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    old = json_lines(tmp_path / "old.jsonl", [{"messages": turns} for turns in OLD])
    new = json_lines(tmp_path / "new.jsonl", [{"messages": turns} for turns in TASK])
    answered = json_lines(tmp_path / "test.jsonl", [{"messages": turns} for turns in OLD[:-1]])
    tree = {
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(chat_model(tmp_path / "model", TOKENIZERS["qwen"]())), "chat_template": True},
        "task": {"path": str(new)},
        "anchors": {
            "source": {"path": str(old), "columns": {"messages": "messages"}},
            "positions": ["text_last", "suffix"],
            "max_new_tokens": 3,
        },
        "craft": {"anchor_cache_dir": str(tmp_path / "anchors"), "anchor_batch_size": 4},
        "train": {"steps": 2, "batch_size": 4},
        "evaluation": {
            "old": {"data": {"path": str(answered)}, "metric": "perplexity"},
            "new": {"data": {"path": str(new)}, "metric": "exact_match", "max_new_tokens": 4},
        },
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test")


def test_conversations_through_every_stage(experiment: Experiment, tmp_path: Path) -> None:
    build(experiment, say=lambda _: None)
    folder = tmp_path / "anchors"
    anchors, model = open_anchors(folder), token_model(load_model(experiment.model, "fp32"))
    assert read_manifest(folder).identity.inputs == "messages"
    for row, turns in enumerate(OLD):
        # An anchor is a conversation without its last turn of the assistant.
        found = anchors.sample(row).conversation
        assert found is not None
        assert list(found.messages) == (turns if len(turns) % 2 else turns[:-1])
        prompt = model.preprocess(anchors.sample(row))
        assert anchors.suffix(row) == model.generate([prompt], 3)[0]

    run = RunFolder(tmp_path / "run")
    run.begin(experiment, ["test"])
    train(experiment, run, OneWorker(), NullObserver())
    result = run.finished()
    assert result is not None
    assert result["steps"] == 2
    assert result["retention_loss"] is not None
    # Scores are of the last turn alone, the loss is of every turn of the assistant.
    features = [model.preprocess_task(sample) for sample in open_source(experiment.task, "task")]
    ends = [model.decode([int(one.tokens["input_ids"][at]) for at in one.layout.predicted]) for one in features]
    assert ends[3] == "Red.Blue 3."
    assert model.decode(model.response_tokens(open_source(experiment.task, "task")[3])) == "Blue 3."
