"""The command line: its output, its files, and its exit codes. In this process, without a cluster."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import ray
import yaml

from craft_ray.config import differences, dump_config
from tests.support.commands import Command, one_line
from tests.support.experiments import Digits


@pytest.fixture
def config(digits: Digits, cached: Path, tmp_path: Path) -> Path:
    """A config that meets its budget, with its own runs folder."""
    changes = {**digits.scored(), "output_dir": str(tmp_path / "runs"), "craft.epsilon_start": 10.0}
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(digits.experiment(cached, changes)))
    return path


def test_train_prints_its_steps_and_refuses_to_run_twice(command: Command, config: Path, tmp_path: Path) -> None:
    code, out, _ = command("train", config)
    assert code == 0
    assert "anchors loaded" in out
    assert "CRaFT is enabled: hidden" in out
    assert out.count("\nStep ") == 6
    assert "budget 10: met" in out
    run = tmp_path / "runs" / "digits-hidden-seed0"
    assert (run / "result.json").exists()
    assert list((run / "tensorboard").glob("events.*"))

    code, _, err = command("train", config)
    assert code == 2
    assert "is finished" in one_line(err)
    code, _, err = command("train", "--resume", run)
    assert code == 2
    assert "is finished" in one_line(err)


def test_a_mistake_before_the_first_step_leaves_the_name_free(command: Command, config: Path) -> None:
    code, _, _ = command("train", config, "model.path=/nowhere")
    assert code == 2
    code, _, err = command("train", config)
    assert code == 0, err


def test_a_mistake_about_the_cache_leaves_no_run_behind(command: Command, config: Path, tmp_path: Path) -> None:
    code, _, err = command("train", config, "craft.positions=[suffix]")
    assert code == 4, err
    assert not list((tmp_path / "runs").glob("*"))


def test_a_mistake_about_the_evaluation_leaves_no_run_behind(command: Command, config: Path, tmp_path: Path) -> None:
    """It is found after the model and the cache were opened, but before the first step."""
    code, _, err = command("train", config, "evaluation.old.data.columns.response=null")
    assert code == 2
    assert "evaluation.old" in one_line(err)
    assert not list((tmp_path / "runs").glob("*"))


def test_a_cluster_that_does_not_start_is_one_line(
    command: Command, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, _, err = command("train", config, "workers.num_workers=1")
    assert code == 2
    assert "Ray does not start on this machine (The current node timed out during startup.)" in one_line(err)
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="LeRobot is installed")
def test_without_lerobot_its_policies_and_data_are_one_line(command: Command, config: Path, tmp_path: Path) -> None:
    (tmp_path / "robot" / "meta").mkdir(parents=True)
    (tmp_path / "robot" / "meta" / "info.json").write_text("{}")
    task = f"task={{path: {tmp_path / 'robot'}}}"
    rollout = "evaluation.old={metric: success, rollout: {env: metaworld, task: drawer-close-v3}}"
    for override, why in (
        ("model.kind=lerobot", "model.kind is lerobot"),
        (task, "task is a LeRobotDataset"),
        ("task={path: somebody/something, format: lerobot}", "task is a LeRobotDataset"),
        (rollout, "evaluation.old rolls out a policy"),
    ):
        code, _, err = command("train", config, override)
        assert code == 2
        assert one_line(err) == (
            f"craft-ray: {why}, but LeRobot is not installed: pip install 'craft-ray[lerobot]' (Python 3.12 or newer)"
        )
        assert not list((tmp_path / "runs").glob("*"))


def test_a_budget_that_is_not_met_is_exit_code_3(command: Command, config: Path) -> None:
    code, out, _ = command("train", config, "craft.epsilon_start=1e-9", "name=tight")
    assert code == 3
    assert "NOT met" in out


def test_a_baseline_needs_no_cache(command: Command, config: Path) -> None:
    code, out, _ = command("train", config, "craft.enabled=false", "craft.anchor_cache_dir=null")
    assert code == 0
    assert "CRaFT is off" in out


def test_the_dry_run_takes_three_steps_and_keeps_nothing(command: Command, config: Path, tmp_path: Path) -> None:
    code, out, _ = command("train", config, "--dry-run", "train.steps=50")
    assert code == 0
    assert out.count("\nStep ") == 3
    assert "Plan: 50 steps of 8 samples on this process, arm hidden" in out
    changed = yaml.safe_load(out[out.index("\n") : out.index("0.24 M")])
    assert changed["train"]["steps"] == 50
    assert "log_every" not in changed["train"]
    assert "task, sample new-" in out
    assert "<image>×16" in out
    assert re.search(r"task, sample .* \d+ tokens, 2 of them learnt: .*\[\[\w+ <eos>\]\]\n", out)
    assert re.search(r"anchor, sample .* of them the teacher's: .*\[\[", out)
    assert re.search(r"evaluation.old, sample .* compared: .*\[\[\w+ <eos>\]\]\n", out)
    assert re.search(r"for 50 steps of [\d.e-]+ s, .* of memory at most; [\d.]+ MiB a checkpoint, 2 kept\n", out)
    assert not (tmp_path / "runs").exists()


def test_a_baseline_beside_token_ce_needs_no_hidden_states(command: Command, digits: Digits, tmp_path: Path) -> None:
    changes = {**digits.scored(), "anchors.modes": ["token_ce"], "compare.token_ce": {"epsilon_start": 20.0}}
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(digits.experiment(tmp_path, changes)))
    code, _, err = command("compare", path, "--arms", "baseline,token_ce", "--seeds", "0")
    assert code == 0, err


def test_a_failed_build_does_not_fix_the_plan(command: Command, digits: Digits, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(digits.experiment(tmp_path)))
    code, _, err = command("anchors", "build", path, "model.max_length=10")
    assert code == 1
    assert "model.max_length is 10: raise it" in one_line(err)
    assert command("anchors", "build", path)[0] == 0


def test_compare_and_report_make_one_file_with_all_arms(command: Command, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ("compare", config, "--seeds", "0,1", "--out", folder, "compare.token_ce={epsilon_start: 20.0}")
    code, out, err = command(*arguments)
    assert code == 0, err
    result = yaml.safe_load((folder / "result.json").read_text())
    assert set(result["summary"]) == {"baseline", "token_ce", "hidden"}
    assert [(run["arm"], run["seed"]) for run in result["runs"]] == [
        (arm, seed) for arm in ("baseline", "token_ce", "hidden") for seed in (0, 1)
    ]
    html = (folder / "report.html").read_text()
    assert "http://" not in html.replace("http://www.w3.org", "")
    code, out, _ = command(*arguments)
    assert code == 0
    assert "6 of 6 runs are finished already" in out
    assert "no row computed" in out

    runs = sorted((folder / "runs").glob("*-seed0"))
    code, _, _ = command("report", *runs, "--out", tmp_path / "again")
    assert code == 0
    assert (tmp_path / "again" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "none.yaml"], 2, "no config at none.yaml"),
        (["train", "CONFIG", "craft.lamda_lr=1"], 2, "did you mean craft.lambda_lr?"),
        (["train", "CONFIG", "craft.retention_freq=0"], 2, "craft.retention_freq"),
        (["train", "CONFIG", "nonsense"], 2, "write key=value"),
        (["train"], 2, "no config given"),
        (["train", "--resume", "."], 2, "is not a run directory"),
        (["train", "CONFIG", "model.path=/nowhere"], 2, "/nowhere"),
        (["train", "CONFIG", "task.path=/nowhere.jsonl"], 2, "there is no data at /nowhere.jsonl"),
        (["train", "CONFIG", "craft.anchor_cache_dir=/nowhere"], 4, "there is no anchor cache in /nowhere"),
        (["train", "CONFIG", "craft.anchor_cache_dir=null"], 2, "craft.anchor_cache_dir"),
        (["train", "CONFIG", "craft.positions=[suffix]"], 4, "holds positions text_last"),
        (["train", "CONFIG", "train.precision=bf16"], 4, "cache fp32, this run bf16"),
        (["compare", "CONFIG", "--arms", "magic"], 2, "compare.arms"),
        (["compare", "CONFIG", "compare.token_ce={epsilon_strat: 1}"], 2, "epsilon_strat"),
        (["compare", "CONFIG", "compare.token_ce={enabled: false}"], 2, "compare.token_ce.enabled"),
        (["train", "CONFIG", "--dry-run", "evaluation.old.data.path=/nowhere.jsonl"], 2, "evaluation.old.data"),
        (["train", "CONFIG", "--dry-run", "--resume", "."], 2, "choose one"),
        (["report", "."], 2, "is not a finished run"),
        (["demo", "--preset", "magic"], 2, "choose digits or text"),
        (["demo", "--out", "s3://bucket/demo"], 2, "--out is in an object store, but a demo writes to a disk"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], code: int, words: str, command: Command, config: Path) -> None:
    found, _, err = command(*(str(config) if a == "CONFIG" else a for a in arguments))
    assert found == code, err
    assert words in one_line(err)


def test_differences_of_a_resumed_config_are_reported_across_kinds_of_a_section(digits: Digits, tmp_path: Path) -> None:
    """Kinds have different keys: a key that one of them lacks is reported like one that has changed."""
    original = digits.experiment(tmp_path).model_dump()
    given = digits.experiment(
        tmp_path, {"task": {"path": "org/robot", "episodes": [0], "rename": {"a": "b"}}}
    ).model_dump()
    found = list(differences(original, given))
    assert any(line.startswith("task.episodes was None, is (0,)") for line in found)
    assert any(line.startswith("task.columns was {") and line.endswith("is None") for line in found)
    assert not list(differences(original, original))


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--resume", "PATH"), ("anchors", "show", "PATH"), ("anchors", "verify", "PATH"), ("report", "PATH"),
        ("merge", "PATH", "OUT"), ("sweep", "--resume", "PATH"), ("price", "PATH"),
        ("export", "PATH", "OUT"), ("push", "PATH", "me/kept"),
        ("train", "CONFIG", "--dry-run", "craft.anchor_cache_dir=PATH"), ("train", "CONFIG", "model.path=PATH"),
    ],
)  # fmt: skip
def test_a_path_that_the_system_does_not_open_is_one_line(
    words: tuple[str, ...], command: Command, config: Path, tmp_path: Path
) -> None:
    known = {"PATH": str(tmp_path / ("n" * 300)), "OUT": str(tmp_path / "out"), "CONFIG": str(config)}
    code, _, err = command(
        *("".join(known.get(part, part) for part in re.split(r"(PATH|OUT|CONFIG)", w)) for w in words)
    )
    assert code == 2
    assert "does not open (File name too long)" in one_line(err)
