"""What a submitted command needs from the working directory is looked at before anything is uploaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from craft_pipelines import demo
from craft_pipelines.cli import app
from craft_pipelines.submitted_inputs import check_inputs
from craft_pipelines.working_dir import excludes
from typer.testing import CliRunner

from craft_ray.errors import ConfigError

Check = Callable[..., None]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Checks a command against a folder with data that is copied, data that is not, and a config."""
    folder = tmp_path / "project"
    for name in (
        "data/new.jsonl",
        "data/old.jsonl",
        "large/new.jsonl",
        "cache/manifest.json",
        "cache/shards/0.parquet",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (tmp_path / "outside.jsonl").write_text("{}")
    (folder / ".gitignore").write_text("/large\n/hidden.yaml\n")

    def run(*command: str, config: str = "run.yaml", **changes: Any) -> None:
        content = {
            "model": {"kind": "causal_lm", "path": "organisation/model"},
            "task": {"path": changes.get("task", "data/new.jsonl")},
            "craft": {"enabled": False},
            "train": {"steps": 1},
        }
        (folder / config).write_text(yaml.safe_dump(content))
        check_inputs(command or ("craft-ray", "train", config), folder, excludes(folder))

    return run


@pytest.mark.parametrize("task", ["data/new.jsonl", "data", "data/*.jsonl", "organisation/data", "s3://bucket/a.jsonl"])
def test_what_the_copy_or_the_cluster_has_is_accepted(check: Check, task: str) -> None:
    """`runs`, the folder for outputs, is relative by default: whether it is written to depends on the command."""
    check(task=task)


def test_an_absolute_path_is_that_of_the_cluster(check: Check) -> None:
    check(task="/shared/nowhere/new.jsonl")


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (
            "large/new.jsonl",
            r"task\.path in run\.yaml is the relative path large/new\.jsonl, and the copy .* leaves it out",
        ),
        ("*/new.jsonl", "leaves it out"),
        ("../outside.jsonl", r"relative path \.\./outside\.jsonl, outside the working directory"),
        ("./data/absent.jsonl", r"relative path data/absent\.jsonl, and there is nothing there"),
    ],
)
def test_what_a_job_would_not_find_is_refused(check: Check, task: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        check(task=task)
    assert "\n" not in error.value.message


def test_overrides_are_part_of_the_config(check: Check) -> None:
    check("craft-ray", "train", "run.yaml", "task.path=/shared/new.jsonl", task="large/new.jsonl")
    with pytest.raises(ConfigError, match=r"task\.path in run\.yaml is the relative path large/new\.jsonl"):
        check("craft-ray", "train", "run.yaml", "task.path=large/new.jsonl")
    with pytest.raises(
        ConfigError, match=r"craft\.anchor_cache_dir in run\.yaml is the relative path cache, .*leaves it out"
    ):
        check("craft-ray", "train", "run.yaml", "craft.anchor_cache_dir=cache")


def test_the_config_itself_is_in_the_copy(check: Check) -> None:
    with pytest.raises(ConfigError, match=r"the command names absent\.yaml, and .* has no such file"):
        check("craft-ray", "train", "absent.yaml")
    with pytest.raises(ConfigError, match=r"the command names hidden\.yaml, and the copy .* leaves it out"):
        check(config="hidden.yaml")


def test_each_craft_ray_command_of_a_line_is_checked(check: Check) -> None:
    line = "craft-ray anchors build run.yaml && craft-ray train run.yaml"
    check(line)
    with pytest.raises(ConfigError, match=r"task\.path in run\.yaml is the relative path large/new\.jsonl"):
        check(f"{line} task.path=large/new.jsonl")


@pytest.mark.parametrize(
    "line", ["cd deep && craft-ray train a.yaml", "craft-ray train $CONFIG.yaml", "./run.sh a.yaml"]
)
def test_what_only_the_cluster_knows_is_left_to_it(check: Check, line: str) -> None:
    check(line)


def test_the_help_of_the_demo_lists_every_preset() -> None:
    shown = CliRunner().invoke(app, ["demo", "--help"]).output
    assert [name for name in demo.PRESETS if name not in shown] == []
