"""The JSON schema that editors read, and the commands that show a config."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from craft_ray.config import json_schema, load_config, read_yaml
from tests.support.commands import Command

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines" / "configs").glob("*.yaml"))
SMALL: dict[str, Any] = {"model": {"path": "m"}, "task": {"path": "d.jsonl"}, "train": {"steps": 2}}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_takes_every_shipped_config(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    assert not list(validator.iter_errors(read_yaml(path.read_text())))


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"steps": 0}},
        {"train": {"steps": 2, "sped": 1}},
        {"model": {"path": "m", "kind": "diffusion"}},
        {"task": {"path": "d.jsonl", "colums": {}}},
        {"training": {}},
    ],
)
def test_the_schema_refuses_mistakes(change: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    assert validator.is_valid(SMALL)
    assert not validator.is_valid({**SMALL, **change})


def test_the_schema_takes_what_is_converted(validator: jsonschema.Draft202012Validator) -> None:
    task = {"path": "d", "format": "lerobot", "episodes": ["0-39", 41]}
    assert validator.is_valid({**SMALL, "task": task, "workers": {"num_workers": [1, 2]}})


def test_the_schema_describes_keys() -> None:
    schema = json_schema()
    assert "micro-batches" in schema["$defs"]["TrainConfig"]["properties"]["batch_size"]["description"]
    assert "hub name" in schema["$defs"]["CsvData"]["properties"]["path"]["description"]  # inherited
    assert "adapter" in schema["properties"]["adapter"]["description"]


def test_show_prints_the_resolved_config(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(SMALL))
    code, out, _ = command("config", "show", path, "train.batch_size=8")
    assert code == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(out)
    assert load_config(shown) == load_config(path, ["train.batch_size=8"])

    code, out, _ = command("config", "show", path, "train.batch_size=8", "--changed")
    assert code == 0
    assert read_yaml(out)["train"] == {"steps": 2, "batch_size": 8}
    assert command("config", "show", path, "train.size=8")[0] == 2


def test_schema_and_version_are_printed(command: Command) -> None:
    code, out, _ = command("config", "schema")
    assert code == 0
    assert json.loads(out) == json_schema()
    code, out, _ = command("--version")
    assert (code, out) == (0, f"craft-ray {version('craft-ray')}\n")


def test_a_shell_completes_commands(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CRAFT_RAY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "craft-ray anchors sh")
    monkeypatch.setenv("COMP_CWORD", "2")
    code, out, _ = command()
    assert (code, out.split()) == (0, ["show"])
