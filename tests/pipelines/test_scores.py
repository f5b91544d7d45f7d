"""Runs that are judged by the lm-evaluation-harness and by a function of the user's own, from config to report; in this
process, and on a worker of Ray, which has another working directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from craft_pipelines.anchors import build

from craft_ray.config import ModelConfig, load_config
from craft_ray.models import load_model
from craft_ray.run.folder import RunFolder
from tests.support.commands import Command, finish, one_line
from tests.support.commands import command as process
from tests.support.harness import write_tasks
from tests.support.weights import spread

pytest.importorskip("lm_eval")

METRIC = '''"""How much of a reply is the response, letter by letter."""


def score(reply, response, row):
    assert row["prompt"]
    return sum(a == b for a, b in zip(reply, response)) / max(len(reply), len(response), 1)
'''


@pytest.fixture(scope="module")
def world(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its anchors, the tasks, a metric and run.yaml, all named relative to it."""
    root = tmp_path_factory.mktemp("scores")
    torch.manual_seed(2)
    model = load_model(ModelConfig(path=str(text_model)), "fp32")
    spread(model.module)
    model.save(root / "model")
    write_tasks(root / "tasks")
    (root / "own_letters.py").write_text(METRIC)
    rows = [{"prompt": f"Call me {i}", "response": "Ishmael"} for i in range(8)]
    for name in ("task", "test"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    harness = {"tasks": "cups", "include_path": "tasks"}
    answered = {"path": "test.jsonl", "columns": {"response": "response"}}
    tree = {
        "name": "scores",
        "output_dir": "runs",
        "model": {"path": "model", "max_length": 128},
        "task": {"path": "task.jsonl", "columns": {"response": "response"}},
        "anchors": {"source": {"path": "test.jsonl"}, "positions": ["text_last"]},
        "craft": {"anchor_cache_dir": "anchors", "anchor_batch_size": 4, "keep": 0.5},
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 1e-2},
        "validation": {"every": 3, "old": {"metric": "lm_eval", "harness": {**harness, "limit": 4}}},
        "evaluation": {
            "old": {"metric": "lm_eval", "harness": harness},
            "new": {"metric": "own_letters:score", "data": answered, "max_new_tokens": 8},
        },
        "workers": {"num_workers": 0},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("CRAFT_RAY_CACHE", str(root / "expanded"))
        build(load_config(root / "run.yaml"), say=lambda _: None)
    return root


def test_a_run_is_kept_judged_scored_and_reported(
    world: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    code, out, err = command("train", "run.yaml")
    assert code in (0, 3), err
    assert "old lm_eval" in out
    assert "of the old skill" in out
    folder = RunFolder(world / "runs" / "scores-hidden-seed0")
    result = folder.finished()
    assert result is not None
    assert result["old"]["metric"] == "lm_eval"
    assert 0 < result["old"]["before"] <= 1
    assert result["old"]["ratio_low"] <= result["old"]["ratio"] <= result["old"]["ratio_high"]
    assert result["certificate"]["samples"] == 5
    assert result["new"]["metric"] == "function"
    assert result["new"]["after"] > result["new"]["before"], "the word was learnt"
    records = folder.read_predictions("old_after")
    assert [record["id"] for record in records] == [f"cups/{i}" for i in range(5)]
    assert result["old"]["after"] == pytest.approx(sum(record["score"] for record in records) / 5)

    code, out, err = command("evaluate", "run.yaml", "--checkpoint", folder.path, "--out", "scores.json")
    assert code == 0, err
    assert "new function, n = 8" in out
    assert "samples score lower" in out
    scores = json.loads((world / "scores.json").read_text())
    assert scores["old"]["scores"][folder.path.name + "/step_000006"]["score"] == pytest.approx(result["old"]["after"])
    assert scores["new"]["higher"] + scores["new"]["lower"] <= 8

    code, _, err = command("train", "run.yaml", "craft.enabled=false", "craft.keep=null", "validation={}")
    assert code == 0, err
    plain = folder.path.with_name("scores-baseline-seed0")
    code, out, err = command("report", folder.path, plain, "--out", "report")
    assert code == 0, err
    page = (world / "report" / "report.html").read_text()
    assert "score lower after plain fine-tuning than after CRaFT" in page
    assert "harness tasks" in page
    assert "own metric" in page

    shared = folder.path.parent.glob(".teacher-score-*.json")
    assert {json.loads(path.read_text())["score"]["metric"] for path in shared} == {"lm_eval", "function"}


def test_the_teacher_is_scored_again_when_the_function_changes(
    world: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    plain = ("craft.enabled=false", "train.steps=4", "validation={}", "craft.keep=null", "evaluation.old=null")
    plain = (*plain, "craft.epsilon_start=1", "output_dir=others")
    code, _, err = command("train", "run.yaml", *plain, "name=first", "evaluation.new.metric=own_first:score")
    assert code == 2
    assert "evaluation.new.function is own_first:score, but there is no module own_first" in one_line(err)
    scored = []
    for value in (0.25, 0.75):
        (world / "own_first.py").write_text(f"def score(reply, response):\n    return {value}\n")
        __import__("sys").modules.pop("own_first", None)
        code, _, err = command(
            "train", "run.yaml", *plain, f"name=v{int(4 * value)}", "evaluation.new.metric=own_first:score"
        )
        assert code == 0, err
        result = RunFolder(world / "others" / f"v{int(4 * value)}-baseline-seed0").finished()
        assert result is not None
        scored.append(result["new"]["before"])
    assert scored == [0.25, 0.75]


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_of_ray_finds_function_tasks_and_their_data(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    code, _, err = finish(process("train", "run.yaml", "name=ray", "workers.num_workers=1"))
    assert code in (0, 3), err
    ours = RunFolder(world / "runs" / "ray-hidden-seed0").finished()
    assert ours is not None
    assert ours["new"]["after"] > ours["new"]["before"]
    assert ours["old"]["samples"] == 5
