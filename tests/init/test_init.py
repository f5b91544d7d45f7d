"""`craft-ray init`: what it finds in models and data, and that a run trains on what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from craft_pipelines.anchors import build

from craft_ray.config import Columns, Experiment, parse_config, read_yaml
from craft_ray.errors import ConfigError, CraftError
from craft_ray.init.columns import find_columns
from craft_ray.init.data import DataFacts
from craft_ray.init.draft import Asked, draft
from craft_ray.init.model import ModelFacts
from craft_ray.init.sizes import Hardware, choose
from craft_ray.run.folder import RunFolder
from tests.support.commands import Command, one_line
from tests.support.experiments import Digits
from tests.support.runs import trained

LAPTOP = Hardware(gpu=False, memory=8 << 30, cpus=2)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(path: Path, count: int, **names: str) -> str:
    question, answer = names.get("question", "question"), names.get("answer", "answer")
    return jsonl(path, [{question: f"{n}+{n}=", answer: str(2 * n)} for n in range(count)])


def read(text: str) -> Experiment:
    return parse_config(read_yaml(text), "draft")


def trains(config: Experiment, folder: Path) -> dict[str, Any]:
    """The result of a few steps of a config, with its cache built before."""
    config = config.changed(
        {
            "output_dir": str(folder / "runs"),
            "craft.anchor_cache_dir": str(folder / "anchors"),
            "workers.num_workers": 0,
            "train.steps": 2,
            "train.warmup_steps": 1,
            "train.check_minutes": 0,
            "anchors.source.limit": 40,
            **{f"evaluation.{skill}.data.limit": 8 for skill in ("old", "new")},
        }
    )
    build(config, say=lambda _: None)
    result = trained(config, folder / "runs" / "one").finished()
    assert result is not None
    return result


def test_a_language_model_trains_on_its_first_config(text_model: Path, tmp_path: Path) -> None:
    task, anchors = sums(tmp_path / "sums.jsonl", 300), sums(tmp_path / "old.jsonl", 60, question="prompt")
    text = draft(Asked(str(text_model), task, anchors, old=anchors), LAPTOP)
    config = read(text)
    assert (config.name, config.model.kind, config.model.chat_template) == ("sums", "causal_lm", False)
    assert (config.task.split, config.evaluation.new.data.split) == ("train[:90%]", "train[90%:]")  # type: ignore[union-attr]
    assert config.task.columns == Columns(prompt="question", response="answer")  # type: ignore[union-attr]
    assert config.evaluation.new is not None
    assert config.evaluation.new.metric == "exact_match"
    assert config.anchors is not None
    assert config.anchors.positions == ("suffix",)
    assert config.workers.threads == 1
    assert config.model.max_length == 16  # bytes: 8 of 299+299=, BOS, 3 of 598, EOS, rounded up
    assert {"old", "new"} <= trains(config, tmp_path).keys()


def test_a_vision_language_model_trains_on_its_first_config(digits: Digits, tmp_path: Path) -> None:
    data = {name: str(digits.data / f"{name}.parquet") for name in ("new_train", "anchors", "old_test", "new_test")}
    asked = Asked(str(digits.model), data["new_train"], data["anchors"], data["old_test"], data["new_test"])
    config = read(draft(asked, LAPTOP))
    assert config.model.kind == "vision_language"
    assert config.task.columns.image == "image"  # type: ignore[union-attr]
    assert config.evaluation.old is not None
    assert config.evaluation.old.metric == "choice"
    assert {"old", "new"} <= trains(config, tmp_path).keys()


def test_running_text_goes_on_at_every_token(text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("It was a dark and stormy night.\n" * 300)
    prose = str(tmp_path / "prose.txt")
    config = read(draft(Asked(str(text_model), prose, prose, new=prose), LAPTOP))
    assert config.task.columns == Columns(prompt=None, response="text")  # type: ignore[union-attr]
    assert config.anchors is not None
    assert config.anchors.source is not None
    assert config.anchors.source.columns == Columns(prompt="text")  # type: ignore[union-attr]
    assert config.anchors.positions == ("all",)
    assert not config.model.append_eos
    assert config.evaluation.old is None
    assert config.evaluation.new is not None
    assert (config.evaluation.new.metric, config.evaluation.new.replies) == ("perplexity", 0)  # no question to reply to


TURNS = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
TEMPLATE = """{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}<eos>{% endfor %}
{%- if add_generation_prompt %}<bos>assistant:{% endif %}"""


def test_conversations_are_written_by_the_models_template(text_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(text_model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "a long answer " * 3}]
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": turns}] * 30)
    config = read(draft(Asked(str(folder), chats, chats, old=chats, new=chats), LAPTOP))
    assert config.model.chat_template
    assert config.task.columns == Columns(messages="messages")  # type: ignore[union-attr]
    assert config.evaluation.new is not None
    assert config.evaluation.new.metric == "perplexity"  # 42 tokens are no answer to compare as a whole
    assert {"old", "new"} <= trains(config, tmp_path).keys()
    for when in ("before", "after"):
        found = RunFolder(tmp_path / "runs" / "one").read_predictions(f"new_{when}")
        assert ["prediction" in record for record in found] == [True] * 8, "answers to read"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"Question": "a", "Answer": "b"}, Columns(prompt="Question", response="Answer")),
        ({"text": "a", "label": "b"}, Columns(prompt="text", response="label")),
        ({"id": "1", "input": "a", "output": "b"}, Columns(id="id", prompt="input", response="output")),
        ({"messages": TURNS, "extra": 1}, Columns(messages="messages")),
        ({"conversations": TURNS}, Columns(messages="conversations")),
        ({"instruction": "a", "input": "", "output": "b"}, Columns(messages="instruction")),
        (
            {"question": "a", "choices": ["x", "y"], "answer": 1},
            Columns(prompt="question", choices="choices", answer_index="answer"),
        ),
        (
            {"question": "a", "choices": ["x", "y"], "answer": "y"},
            Columns(prompt="question", choices="choices", response="answer"),
        ),
        ({"pixels": {"bytes": b"", "path": None}, "prompt": "a", "caption": "b"}, None),
    ],
)
def test_columns_are_known_by_their_names_and_cells(row: dict[str, Any], expected: Columns | None) -> None:
    expected = expected or Columns(image="pixels", prompt="prompt", response="caption")
    found = find_columns(list(row), [row], "data", labelled=True, images="pixels" in row, template=True)
    assert found.columns == expected


def test_anchors_need_no_response() -> None:
    row = {"prompt": "a", "response": "b", "choices": ["b"]}
    found = find_columns(list(row), [row], "data", labelled=False, images=False, template=False)
    assert found.columns == Columns(prompt="prompt")


def test_a_batch_fits_into_the_memory() -> None:
    model = ModelFacts("m", "causal_lm", parameters=10**9, token_bytes=10**7)
    data = DataFacts("d", 1000, Columns(), prompt_tokens=90, response_tokens=6, counted=1000)

    def sizes(gigabytes: int, lora: bool = False) -> Any:
        return choose(model, data, [data], data, lora, Hardware(False, gigabytes * 10**9, 1))

    assert sizes(64).accumulate == 1
    small = sizes(30)  # 24 planned, 20 of them for weights, gradients and moments
    assert (small.batch, small.accumulate, small.checkpointing) == (16, 4, False)
    assert sizes(20).checkpointing
    assert sizes(20, lora=True).accumulate == 2
    for found in (sizes(64), small, sizes(20)):
        assert found.batch % found.accumulate == 0
    assert small.memory <= 24 * 10**9


def test_mistakes_are_one_line(text_model: Path, digits: Digits, tmp_path: Path, command: Command) -> None:
    good = sums(tmp_path / "sums.jsonl", 30)
    odd = jsonl(tmp_path / "odd.jsonl", [{"a": "1", "b": "2"}])
    unlabelled = jsonl(tmp_path / "unlabelled.jsonl", [{"prompt": "1"}])
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": TURNS}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text('{"type": "act"}')
    model = str(text_model)
    for asked, words in [
        (Asked("/nowhere", good, good), "--model /nowhere"),
        (Asked(str(tmp_path / "bert"), good, good), "is of type vit"),
        (Asked(model, odd, good), "has the columns a, b: none of them is known as a prompt"),
        (Asked(model, unlabelled, good), "none of them is known as a response"),
        (Asked(model, chats, good), "has no chat template"),
        (Asked(model, str(tmp_path / "empty.jsonl"), good), "holds no sample"),
        (Asked(model, str(tmp_path / "none.jsonl"), good), "there is no data"),
        (Asked(str(digits.model), good, good), "none of them holds images"),
        (Asked(model, good, good, preset="robot"), "--preset robot"),
        (Asked(str(tmp_path / "policy"), good, good), "is a table"),
    ]:
        with pytest.raises(CraftError) as caught:
            draft(asked, LAPTOP)
        assert words in caught.value.message
        assert "\n" not in caught.value.message
    code, _, err = command("init", "--model", model, "--task", good, "--anchors", good, "--out", odd)
    assert code == ConfigError.exit_code
    assert "exists" in one_line(err)


def test_the_command_writes_the_file(text_model: Path, tmp_path: Path, command: Command) -> None:
    good, out = sums(tmp_path / "sums.jsonl", 30), tmp_path / "first.yaml"
    options = ("--model", text_model, "--task", good, "--anchors", good, "--preset", "lora", "--out", out)
    code, said, _ = command("init", *options)
    assert code == 0
    assert out.read_text() in said
    config = read(out.read_text())
    assert config.adapter is not None
    assert config.evaluation.new is None  # a tenth of 30 rows would measure nothing


@pytest.mark.ray
@pytest.mark.slow
def test_the_path_of_a_newcomer(
    text_model: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """init, anchors build, train --dry-run, train and report, on the file as it was written. A teacher with random
    weights need not keep within the budget, which is exit code 3."""
    monkeypatch.chdir(tmp_path)
    task, anchors = sums(tmp_path / "sums.jsonl", 300), sums(tmp_path / "old.jsonl", 60, question="prompt")
    options = ("--model", text_model, "--task", task, "--anchors", anchors, "--old", anchors, "--preset", "full")
    said = []
    for arguments in (
        ("init", *options, "--out", "first.yaml"),
        ("anchors", "build", "first.yaml"),
        ("train", "first.yaml", "--dry-run"),
        ("train", "first.yaml"),
        ("report", "runs/sums-hidden-seed0"),
    ):
        code, out, err = command(*arguments)
        assert code in ((0, 3) if arguments == ("train", "first.yaml") else (0,)), (arguments, err)
        said.append(out)
    config, result = read(Path("first.yaml").read_text()), RunFolder(Path("runs/sums-hidden-seed0")).finished()
    assert config.adapter is None
    assert "task, sample" in said[2]
    assert result is not None
    assert result["steps"] == config.train.steps
    assert "sums" in Path("report.html").read_text()


@pytest.mark.parametrize("cell", [["a.png", "b.png"], [{"bytes": b"x", "path": None}], b"x"])
def test_a_list_of_images_is_found(cell: Any) -> None:
    rows = [{"pages": cell, "question": "?", "answer": "a"}, {"pages": [], "question": "?", "answer": "b"}]
    named = [{"images" if name == "pages" else name: value for name, value in row.items()} for row in rows]
    found = find_columns(list(named[0]), named, "a.jsonl", labelled=True, images=True, template=False).columns
    assert (found.image, found.prompt, found.response) == ("images", "question", "answer")
    if cell != ["a.png", "b.png"]:  # a path is known as an image by its column's name alone
        other = find_columns(list(rows[0]), rows, "a.jsonl", labelled=True, images=True, template=False).columns
        assert other.image == "pages"
