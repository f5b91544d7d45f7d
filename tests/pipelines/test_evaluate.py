"""`craft-ray evaluate`: a model and its checkpoints on the same samples, side by side. In this process."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from craft_pipelines import cli
from craft_pipelines.evaluate import Scored, changes, labelled, lines, model_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from craft_ray.config import dump_config
from craft_ray.models.base import Model
from craft_ray.run.folder import RunFolder
from craft_ray.run.scoring import Score
from craft_ray.statistics import mcnemar
from craft_ray.workers import Workers
from tests.support.commands import Command, one_line
from tests.support.experiments import ANSWERED, Digits

QUESTIONS = {"image": "image_path", "prompt": "question", "choices": "choices", "answer_index": "answer_index"}
SAMPLES = 20


def write_questions(data: Path, folder: Path) -> Path:
    """Digits as questions in JSON lines, with their pictures next to them."""
    rows = pq.read_table(data / "old_test.parquet").slice(0, SAMPLES).to_pylist()
    lines = []
    for row in rows:
        image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
        (folder / f"{row['id']}.png").write_bytes(image)
        choices = row["choices"][:4]
        if row["response"] not in choices:
            choices[1] = row["response"]
        right = choices.index(row["response"])
        lines.append(
            {"image_path": f"{row['id']}.png", "question": row["prompt"], "choices": choices, "answer_index": right}
        )
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def world(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.yaml and its run, which has two checkpoints."""
    folder = tmp_path_factory.mktemp("evaluate")
    changes: dict[str, Any] = {
        "craft.enabled": False,
        "craft.anchor_cache_dir": None,
        "evaluation.old": {
            "data": {"path": str(write_questions(digits.data, folder)), "columns": QUESTIONS},
            "metric": "choice",
            "batch_size": 16,
        },
        "evaluation.new": {
            "data": {"path": str(digits.data / "new_test.parquet"), "columns": ANSWERED, "limit": SAMPLES},
            "metric": "perplexity",
        },
    }
    (folder / "run.yaml").write_text(dump_config(digits.experiment(folder, changes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["craft-ray", "train", str(folder / "run.yaml")])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return folder


def run_folder(world: Path) -> Path:
    return world / "runs" / "digits-baseline-seed0"


def test_a_model_and_its_checkpoint_are_shown_side_by_side(command: Command, world: Path, tmp_path: Path) -> None:
    """The scores equal those of the run itself before and after training."""
    out = tmp_path / "scores.json"
    code, printed, err = command("evaluate", world / "run.yaml", "--checkpoint", run_folder(world), "--out", out)
    assert code == 0, err
    result = json.loads(out.read_text())
    again, _, err = command("evaluate", world / "run.yaml", "--checkpoint", run_folder(world), "--out", out)
    assert again == 0, err
    assert json.loads(out.read_text()) == result
    trained = RunFolder(run_folder(world)).finished()
    assert trained is not None
    label = "digits-baseline-seed0/step_000006"
    assert [model["label"] for model in result["models"]] == ["teacher", label]
    assert len({model["weights"] for model in result["models"]}) == 2
    assert result["old"]["scores"] == {
        "teacher": {"score": trained["old"]["before"], "margin": trained["old"]["margin_before"]},
        label: {"score": trained["old"]["after"], "margin": trained["old"]["margin_after"]},
    }
    assert result["new"]["scores"] == {
        "teacher": {"score": trained["new"]["before"]},
        label: {"score": trained["new"]["after"]},
    }

    records = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 2 * SAMPLES
    old = [[r for r in records if (r["model"], r["skill"]) == (name, "old")] for name in ("teacher", label)]
    assert [r["id"] for r in old[0]] == [r["id"] for r in old[1]]
    for name, mine in zip(("teacher", label), old, strict=True):
        assert sum(r["margin"] for r in mine) / SAMPLES == pytest.approx(result["old"]["scores"][name]["margin"])
        assert [r["correct"] for r in mine] == [r["margin"] > 0 for r in mine]
    turned = [(one["correct"], two["correct"]) for one, two in zip(*old, strict=True)]
    lost, won = turned.count((True, False)), turned.count((False, True))
    assert lost + won > 0
    assert (result["old"]["right_to_wrong"], result["old"]["wrong_to_right"]) == (lost, won)
    assert "right_to_wrong" not in result["new"]

    head, choice, perplexity, flips = printed.splitlines()[2:6]
    assert head.split() == ["teacher", label]
    scores = [result["old"]["scores"][name] for name in ("teacher", label)]
    cells = [f"{found['score']:.3f}, margin {found['margin']:+.3f}" for found in scores]
    assert re.split("   +", choice) == [f"old choice, n = {SAMPLES}", *cells]
    assert perplexity.startswith(f"new perplexity, n = {SAMPLES}")
    changed = f"{lost} from right to wrong, {won} from wrong to right (McNemar's P "
    assert flips.startswith(f"old, teacher -> {label}: {changed}")
    assert result["old"]["mcnemar_p"] == mcnemar(lost, won)


def test_token_accuracy_is_compared_by_each_samples_right_tokens() -> None:
    def scored(label: str, *hits: int) -> Scored:
        records = [{"id": str(row), "tokens": 9, "hits": each, "nll": 1.0} for row, each in enumerate(hits)]
        return Scored(label, label, "0", {"old": Score("token_accuracy", sum(hits) / 36, 4, records)})

    both = [scored("teacher", 9, 9, 9, 3), scored("student", 8, 9, 2, 5)]
    assert changes(both) == {"old": (2, 1)}
    assert list(lines(both))[-1] == (
        "old, teacher -> student: 2 samples with fewer right tokens, 1 with more (sign test's P 1)"
    )


def test_two_checkpoints_beside_the_teacher(command: Command, world: Path) -> None:
    """A wider table without a count of changed answers, and no file without --out."""
    before = sorted(path for path in world.rglob("*") if path.is_file())
    steps = [run_folder(world) / "checkpoints" / name for name in ("step_000004", "step_000006")]
    options = [part for step in steps for part in ("--checkpoint", step)]
    code, printed, err = command("evaluate", world / "run.yaml", *options, "evaluation.new=null")
    assert code == 0, err
    head, choice = printed.splitlines()[3:]
    assert head.split() == ["teacher", *(f"digits-baseline-seed0/{step.name}" for step in steps)]
    assert choice.count("margin") == 3
    assert sorted(path for path in world.rglob("*") if path.is_file()) == before


def test_the_teacher_alone(command: Command, world: Path) -> None:
    code, printed, err = command("evaluate", world / "run.yaml", "evaluation.old=null")
    assert code == 0, err
    assert [line.split()[0] for line in printed.splitlines()] == ["scoring", "teacher", "new"]


def test_each_of_several_old_skills_has_a_row(command: Command, world: Path, digits: Digits, tmp_path: Path) -> None:
    def scored(limit: int) -> dict[str, Any]:
        data = {"path": str(digits.data / "old_test.parquet"), "columns": ANSWERED, "limit": limit}
        return {"evaluation": {"data": data, "metric": "perplexity"}}

    skills = f"skills={json.dumps({'drawer': scored(6), 'door': scored(4)})}"
    out = tmp_path / "scores.json"
    changes = "evaluation.old=null", "anchors=null", skills
    code, printed, err = command(
        "evaluate", world / "run.yaml", "--checkpoint", run_folder(world), "--out", out, *changes
    )
    assert code == 0, err
    rows = [re.split("   +", line)[0] for line in printed.splitlines()[3:6]]
    assert rows == ["drawer perplexity, n = 6", "door perplexity, n = 4", f"new perplexity, n = {SAMPLES}"]
    result = json.loads(out.read_text())
    assert [result[skill]["samples"] for skill in ("drawer", "door")] == [6, 4]
    assert "old" not in result
    records = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [sum(r["skill"] == skill for r in records) for skill in ("drawer", "door")] == [12, 8]


class Attempts:
    """Six episodes; which ones succeed depends on the model's weights."""

    name, fingerprint = "attempts", "0"

    def __len__(self) -> int:
        return 6

    def check(self, model: Model) -> None: ...

    def run(self, model: Model, rows: Sequence[int], workers: Workers) -> list[dict[str, Any]]:
        luck = int(model.weights_fingerprint(), 16) >> 8
        return [{"correct": bool(luck >> row & 1), "steps": row} for row in rows]


def test_episodes_in_a_simulator(
    command: Command, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("craft_pipelines.evaluate.open_eval_set", lambda *_: Attempts())
    rollout = "evaluation.new={metric: success, rollout: {env: metaworld, task: drawer-close-v3}}"
    out = tmp_path / "scores.json"
    code, _, err = command(
        "evaluate", world / "run.yaml", "--checkpoint", run_folder(world), "--out", out, "evaluation.old=null", rollout
    )
    assert code == 0, err
    result = json.loads(out.read_text())
    mine = [[bool(int(model["weights"], 16) >> 8 >> row & 1) for row in range(6)] for model in result["models"]]
    assert [found["score"] for found in result["new"]["scores"].values()] == [sum(one) / 6 for one in mine]
    pairs = list(zip(*mine, strict=True))
    assert result["new"]["right_to_wrong"] == pairs.count((True, False))
    assert result["new"]["wrong_to_right"] == pairs.count((False, True))


def test_a_checkpoint_has_several_names(world: Path) -> None:
    last = run_folder(world) / "checkpoints" / "step_000006" / "model"
    for path in (run_folder(world), last.parent, last, run_folder(world) / "checkpoints" / "last"):
        assert model_folder(path) == last.resolve()


def test_models_with_the_same_name_are_labelled_by_their_paths(tmp_path: Path) -> None:
    steps = [tmp_path / folder / "run" / "checkpoints" / "step_000100" / "model" for folder in "ab"]
    assert list(labelled([steps[0]])) == ["run/step_000100"]
    assert list(labelled(steps)) == [str(step) for step in steps]
    assert list(labelled([tmp_path / "teacher"])) == [str(tmp_path / "teacher")]
    assert list(labelled([tmp_path / "tuned", steps[0]])) == ["tuned", "run/step_000100"]


def test_a_bad_row_ends_the_command_before_anything_is_scored(
    command: Command, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *lines, last = (world / "questions.jsonl").read_text().splitlines()
    row = json.loads(last)
    bad = world / "bad.jsonl"
    bad.write_text("\n".join([*lines, json.dumps({**row, "choices": [row["choices"][0]] * 4})]))
    monkeypatch.setattr("craft_pipelines.evaluate.score", lambda *_: pytest.fail("a row was scored"))
    changes = f"evaluation.old.data.path={bad}", "train.check_minutes=5"
    code, _, err = command("evaluate", world / "run.yaml", *changes)
    bad.unlink()
    assert code == 1, err
    assert f"evaluation.old.data: {bad}, row {SAMPLES - 1}: its response" in one_line(err)
    assert "appears more than once among its choices" in err


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluation={}"], "the config names nothing to score on: add evaluation.old or evaluation.new"),
        (["--checkpoint", "/nowhere"], "--checkpoint /nowhere does not exist"),
        (["--checkpoint", "WORLD"], "is neither a run, nor a checkpoint of one, nor a model folder"),
        (["--checkpoint", "RUN", "--checkpoint", "RUN"], "step_000006/model twice"),
        (["--out", "scores.txt"], "--out is scores.txt: give a .json file"),
        (["evaluation.old.data.columns.response=choices"], "both give the answer: specify only one"),
        (["evaluation.old.data.columns.choices=null"], "answer_index 'answer_index' is an index into choices"),
        (["evaluation.old.data.columns.answer_index=right"], "answer_index is 'right', but"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str, command: Command, world: Path) -> None:
    named = {"WORLD": str(world), "RUN": str(run_folder(world))}
    code, _, err = command("evaluate", world / "run.yaml", *(named.get(a, a) for a in arguments))
    assert code == 2, err
    assert words in one_line(err)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"answer_index": 4},
            "row 3: column 'answer_index' holds 4; the position of the right one among its 4 choices",
        ),
        ({"choices": ["7"], "answer_index": 0}, "bad.jsonl, row 3 has only the choice '7'"),
        ({"choices": ["7", "7"], "answer_index": 0}, "bad.jsonl, row 3: its response '7' appears more than once"),
        ({"image_path": "none.png"}, "row 3"),
    ],
)
def test_a_line_that_is_not_a_question(change: dict[str, Any], words: str, command: Command, world: Path) -> None:
    lines = (world / "questions.jsonl").read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    path = world / "bad.jsonl"
    path.write_text("\n".join(lines))
    code, _, err = command("evaluate", world / "run.yaml", f"evaluation.old.data.path={path}")
    assert code == 1, err
    assert words in one_line(err)


def test_a_run_without_a_checkpoint(command: Command, world: Path, tmp_path: Path) -> None:
    shutil.copy(world / "run.yaml", tmp_path / "config.yaml")
    code, _, err = command("evaluate", world / "run.yaml", "--checkpoint", tmp_path)
    assert code == 2
    assert "the run has no checkpoint" in one_line(err)


def test_missing_weights(command: Command, world: Path, tmp_path: Path) -> None:
    """Missing weights would be random."""
    broken = shutil.copytree(run_folder(world) / "checkpoints" / "last" / "model", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop(next(name for name in sorted(tensors) if name.endswith("q_proj.weight")))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command("evaluate", world / "run.yaml", "--checkpoint", broken, "evaluation.new=null")
    assert code == 1
    assert "did not load completely: 1 weights are missing" in one_line(err)


def test_a_model_with_another_vocabulary(command: Command, text_model: Path, digits: Digits, tmp_path: Path) -> None:
    """The token ids of the config's tokenizer would have no meaning for it."""
    other = AutoModelForCausalLM.from_pretrained(text_model)
    other.resize_token_embeddings(other.config.vocab_size + 8)
    other.save_pretrained(tmp_path / "other")
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    columns = {"prompt": "prompt", "response": "response"}
    changes = {
        "model": {"path": str(text_model)},
        "evaluation.old": {"data": {"path": str(data), "columns": columns}, "metric": "perplexity"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(Digits(text_model, digits.data).experiment(tmp_path, changes)))
    code, _, err = command("evaluate", path, "--checkpoint", tmp_path / "other")
    assert code == 2
    assert "score the former as model.path of a separate config" in one_line(err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu(command: Command, world: Path) -> None:
    code, _, err = command("evaluate", world / "run.yaml", "workers.use_gpu=true")
    assert code == 2
    assert "this machine has no GPU" in one_line(err)
