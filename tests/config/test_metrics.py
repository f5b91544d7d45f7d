"""Metrics with settings of their own: what may be written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from craft_ray.config import deciding_difference, load_config, parse_config
from craft_ray.errors import ConfigError


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    tree: dict[str, Any] = {"model": {"path": "m"}, "task": {"path": "d.jsonl"}, "train": {"steps": 2}}
    path.write_text(yaml.safe_dump(tree))
    return path


def get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def refusal(path: Path, override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    "section",
    ["{metric: 'own.module:score', data: {path: a}}", "{metric: {function: 'own.module:score'}, data: {path: a}}"],
)
def test_a_function_may_stand_in_place_of_the_metric(section: str, minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, [f"evaluation.new={section}"], tmp_path)
    scored = config.evaluation.new
    assert scored is not None
    assert (scored.metric, get(scored, "function"), get(scored, "folder")) == (
        "function",
        "own.module:score",
        str(tmp_path),
    )
    assert parse_config(config.model_dump(), "again").evaluation.new == scored


def test_one_task_of_the_harness_is_a_list_of_one(minimal: Path, tmp_path: Path) -> None:
    section = "{metric: lm_eval, harness: {tasks: cups, include_path: tasks}}"
    config = load_config(minimal, [f"evaluation.old={section}"], tmp_path)
    assert get(config, "evaluation.old.harness.tasks") == ("cups",)
    assert get(config, "evaluation.old.harness.include_path") == str(tmp_path / "tasks")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            "{metric: 'a b:c', data: {path: a}}",
            "evaluation.new.function: 'a b:c' names no function: write MODULE:FUNCTION",
        ),
        ("{metric: regex, data: {path: a}}", "evaluation.new.pattern is missing"),
        ("{metric: regex, pattern: '(', data: {path: a}}", "evaluation.new.pattern: '(' is not a regular expression ("),
        (
            "{metric: regex, pattern: '(a)(b)', data: {path: a}}",
            "evaluation.new.pattern: '(a)(b)' has 2 groups, and one",
        ),
        (
            "{metric: numeric, tolerance: -1, data: {path: a}}",
            "evaluation.new.tolerance: Input should be greater than or",
        ),
        (
            "{metric: contains, tolerance: 1, data: {path: a}}",
            "evaluation.new.tolerance belongs to held-out samples with",
        ),
        ("{metric: lm_eval}", "evaluation.new.harness is missing"),
        ("{metric: lm_eval, harness: {tasks: []}}", "evaluation.new.harness.tasks: Tuple should have at least 1 item"),
        ("{metric: lm_eval, harness: {tasks: a}, data: {path: a}}", "evaluation.new.data belongs to held-out samples"),
        ("{metric: lmeval, data: {path: a}}", "evaluation.new.metric: Input should be one of 'exact_match'"),
    ],
)
def test_a_metric_with_wrong_settings(section: str, said: str, minimal: Path) -> None:
    assert refusal(minimal, f"evaluation.new={section}").startswith(f"{minimal}: {said}")


def test_a_run_may_be_taken_up_where_its_tasks_and_functions_lie_elsewhere(minimal: Path, tmp_path: Path) -> None:
    own = "evaluation.new={metric: 'own:score', data: {path: ./a.jsonl}}"
    harness = "evaluation.old={metric: lm_eval, harness: {tasks: cups, include_path: tasks}}"
    here, there = (load_config(minimal, [own, harness], tmp_path / name) for name in ("here", "there"))
    assert deciding_difference(here, there) is None
    other = load_config(minimal, [own, harness, "evaluation.old.harness.limit=3"], tmp_path / "here")
    assert deciding_difference(here, other) == "evaluation.old.harness.limit was None, is 3"
