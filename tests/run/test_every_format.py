"""Every form of data and every metric through all stages: the cache, a run under its budget, scores of its
checkpoint."""

from __future__ import annotations

import base64
import csv
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from craft_pipelines.anchors import build
from craft_pipelines.evaluate import evaluate

from craft_ray.anchors.reader import open_anchors
from craft_ray.config import Experiment, ModelConfig, parse_config
from craft_ray.data.sample import Sample
from craft_ray.data.task import open_task
from craft_ray.models import load_model
from craft_ray.models.capabilities import TokenModel, token_model
from craft_ray.run.folder import RunFolder
from craft_ray.run.judges import last_number
from tests.support.caches import json_lines
from tests.support.runs import trained
from tests.support.tiling import build as build_tiling
from tests.support.tiling import png
from tests.support.tokenizers import CHATML, TOKENIZERS, chat_model

ROWS = [(f"What is {n}?", f"Certainly {n}.") for n in range(8)]
TEXT = "One primary color is red. The quick brown fox jumps over the lazy dog. "
PLAIN = {"prompt": "question", "response": "answer"}
QUESTIONS = 3
"""That the teacher answers as the data do, and as many that it does not."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    return chat_model(tmp_path_factory.mktemp("every") / "model", TOKENIZERS["qwen"]())


@pytest.fixture(scope="module")
def model(folder: Path) -> TokenModel:
    return token_model(load_model(ModelConfig(**settings(folder)), "fp32"))


def settings(folder: Path) -> dict[str, Any]:
    return {"kind": "causal_lm", "path": str(folder), "chat_template": True, "max_length": 128}


def experiment(folder: Path, files: Path, task: dict[str, Any], anchors: dict[str, Any], scored: Any) -> Experiment:
    tree = {
        "output_dir": str(files / "runs"),
        "model": settings(folder),
        "task": task,
        "anchors": {"source": anchors, "positions": ["text_last"]},
        "craft": {"anchor_cache_dir": str(files / "anchors"), "anchor_batch_size": 2, "retention_mode": "hidden"},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        "validation": {"old": scored, "new": scored},
        "evaluation": {"old": scored, "new": scored},
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test")


def check_scores(config: Experiment, run: RunFolder) -> dict[str, float]:
    """`evaluate` of the checkpoint finds what the run has found; the teacher's scores by skill."""
    result = run.finished()
    assert result is not None
    assert result["steps"] == 2
    assert math.isfinite(result["retention_loss"])
    teacher, student = evaluate(config, [run.path], None, say=lambda _: None)
    for skill in ("old", "new"):
        assert teacher.scores[skill].value == pytest.approx(result[skill]["before"])
        assert student.scores[skill].value == pytest.approx(result[skill]["after"])
    assert teacher.weights != student.weights
    return {skill: score.value for skill, score in teacher.scores.items()}


# -- forms of data


def turns(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sharegpt(question: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def parts(question: str, answer: str) -> dict[str, Any]:
    said = turns(question, answer)
    return {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in said]}


def alpaca(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer}


def nested(question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "answer": {"text": answer, "votes": 3}}


def split_up(question: str, answer: str) -> dict[str, Any]:
    name, rest = question.split(" ", 1)
    return {"question": name, "context": rest, "answer": answer}


def lines(row: Callable[[str, str], dict[str, Any]], files: Path, **source: Any) -> dict[str, Any]:
    return {"path": str(json_lines(files / "rows.jsonl", [row(*pair) for pair in ROWS])), **source}


def table(delimiter: str, files: Path) -> dict[str, Any]:
    path = files / ("rows.tsv" if delimiter == "\t" else "rows.csv")
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("question", "answer"), *ROWS])
    return {"path": str(path), "columns": PLAIN}


def parquet(row: Callable[[str, str], dict[str, Any]], files: Path, **source: Any) -> dict[str, Any]:
    pq.write_table(pa.Table.from_pylist([row(*pair) for pair in ROWS]), files / "rows.parquet")
    return {"path": str(files / "rows.parquet"), **source}


def plain(question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "answer": answer}


NESTED = {"prompt": "question", "response": "answer.text"}
TEMPLATE = {"prompt": "{question}\n{context}", "response": "answer"}

SOURCES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "openai": partial(lines, lambda q, a: {"messages": turns(q, a)}),
    "sharegpt": partial(lines, sharegpt),
    "alpaca": partial(lines, alpaca),
    "content parts": partial(lines, parts),
    "csv": partial(table, ","),
    "tsv": partial(table, "\t"),
    "nested": partial(lines, nested, columns=NESTED),
    "nested parquet": partial(parquet, nested, columns=NESTED),
    "template": partial(lines, split_up, columns=TEMPLATE),
    "part": partial(lines, plain, columns=PLAIN, split="train[50%:]"),
    "parquet": partial(parquet, plain, columns=PLAIN),
    "conversations in parquet": partial(parquet, lambda q, a: {"messages": turns(q, a)}),
}


@pytest.mark.parametrize("form", SOURCES)
def test_a_form_of_data_through_every_stage(form: str, folder: Path, model: TokenModel, tmp_path: Path) -> None:
    source = SOURCES[form](tmp_path)
    expected = ROWS[4:] if form == "part" else ROWS
    if form == "template":
        expected = [(question.replace(" ", "\n", 1), answer) for question, answer in expected]
    config = experiment(folder, tmp_path, source, source, {"data": source, "metric": "perplexity"})
    assert [seen(model, sample) for sample in open_task(config.task)] == [
        (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", answer) for question, answer in expected
    ]
    build(config, say=lambda _: None)
    assert len(open_anchors(tmp_path / "anchors")) == len(expected)
    check_scores(config, trained(config, tmp_path / "run"))


def seen(model: TokenModel, sample: Sample) -> tuple[str, str]:
    """What a model reads before what it learns, and what it learns."""
    features = model.preprocess_task(sample)
    ids = features.tokens["input_ids"].tolist()
    learnt = model.decode([ids[at] for at in features.layout.predicted])
    return model.spelled(ids[: features.layout.prompt_length]), learnt


def test_plain_text_through_every_stage(folder: Path, model: TokenModel, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 4)
    source = {"path": str(tmp_path / "text.txt"), "chunk_chars": len(TEXT)}
    task, anchors = source | {"columns": {"prompt": None, "response": "text"}}, source | {"columns": {"prompt": "text"}}
    config = experiment(folder, tmp_path, task, anchors, {"data": task, "metric": "token_accuracy"})
    build(config, say=lambda _: None)
    assert [open_anchors(tmp_path / "anchors").sample(row).prompt for row in range(4)] == [TEXT] * 4
    assert {seen(model, sample)[1] for sample in open_task(config.task)} == {TEXT}
    check_scores(config, trained(config, tmp_path / "run"))


def test_a_mixture_through_every_stage(folder: Path, model: TokenModel, tmp_path: Path) -> None:
    half, rest = (
        str(json_lines(tmp_path / f"{name}.jsonl", [plain(*pair) for pair in pairs]))
        for name, pairs in (("half", ROWS[:4]), ("rest", ROWS[4:]))
    )
    source = {"path": half, "columns": PLAIN}
    task = {"mix": [{**source, "weight": 3}, {"path": rest, "columns": PLAIN, "weight": 1}]}
    config = experiment(folder, tmp_path, task, source, {"data": source, "metric": "perplexity"})
    assert [seen(model, sample)[1] for sample in open_task(config.task)] == [answer for _, answer in ROWS]
    build(config, say=lambda _: None)
    check_scores(config, trained(config, tmp_path / "run"))


def test_a_stream_through_every_stage(
    folder: Path, model: TokenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist([plain(*pair) for pair in ROWS]), tmp_path / "data" / "train.parquet")
    stored = {"path": str(tmp_path / "data"), "columns": PLAIN, "format": "dataset"}
    task = stored | {"streaming": True, "shuffle_buffer": 4}
    config = experiment(folder, tmp_path, task, stored, {"data": stored, "metric": "perplexity"})
    source = open_task(config.task)
    assert {seen(model, source[row])[1] for row in range(len(ROWS))} == {answer for _, answer in ROWS}
    build(config, say=lambda _: None)
    check_scores(config, trained(config, tmp_path / "run"))


CALLS = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
CALLING = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] }}" + CALLS
)
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]


def with_tools(question: str, answer: str) -> dict[str, Any]:
    """A call as OpenAI's data have it, with its arguments as text."""
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}}
    asked, answered = turns(question, answer)
    system = {"role": "system", "content": "Be brief!"}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [system, asked, said, {"role": "tool", "content": "12"}, answered], "tools": TOOLS}


def several(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [*turns("Hello there", "Hello."), *turns(question, answer)]}


@pytest.mark.parametrize("form", ["several turns", "system, tools and calls"])
def test_longer_conversations_through_every_stage(form: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["qwen"]()
    tokenizer.chat_template = CALLING
    folder = chat_model(tmp_path / "model", tokenizer)
    tools = form != "several turns"
    source = lines(with_tools if tools else several, tmp_path)
    source["columns"] = {"messages": "messages", **({"tools": "tools"} if tools else {})}
    config = experiment(folder, tmp_path, source, source, {"data": source, "metric": "perplexity"})
    config = config.changed({"model.max_length": 256})
    model = token_model(load_model(config.model, "fp32"))
    first = '{"name": "clock", "arguments": {"zone": "CET"}}' if tools else "Hello."
    assert [seen(model, sample)[1] for sample in open_task(config.task)] == [f"{first}{answer}" for _, answer in ROWS]
    build(config, say=lambda _: None)
    found = open_anchors(tmp_path / "anchors").sample(0).conversation
    assert found is not None
    assert len(found.messages) == (4 if tools else 3)
    assert (found.tools is not None) == tools
    check_scores(config, trained(config, tmp_path / "run"))


@pytest.mark.parametrize("form", ["lists of images", "conversations with images"])
def test_images_through_every_stage(form: str, tmp_path: Path) -> None:
    uris = ["data:image/png;base64," + base64.b64encode(png(8, 8 + 8 * n, n)).decode() for n in range(3)]
    cells: list[dict[str, Any]] = [{"image": uris[: 1 + n % 3], "n": n} for n in range(len(ROWS))]
    for cell, (question, answer) in zip(cells, ROWS, strict=True):
        asked = "<image>" * len(cell["image"]) + question
        cell |= plain(asked, answer) if form == "lists of images" else {"messages": turns(asked, answer)}
    source: dict[str, Any] = {"path": str(json_lines(tmp_path / "rows.jsonl", cells))}
    source["columns"] = {"image": "image", **(PLAIN if form == "lists of images" else {"messages": "messages"})}
    model = build_tiling("idefics3", tmp_path / "model")
    config = experiment(model, tmp_path, source, source, {"data": source, "metric": "token_accuracy"})
    config = config.changed({"model.kind": "vision_language", "model.max_length": 512})
    build(config, say=lambda _: None)
    assert [len(open_anchors(tmp_path / "anchors").sample(row).pictures or ()) for row in range(4)] == [1, 2, 3, 1]
    check_scores(config, trained(config, tmp_path / "run"))


# -- metrics


@pytest.fixture(scope="module")
def asked(folder: Path, model: TokenModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a cache, and questions: the teacher gives the answers to half of them, as they are in the data."""
    found = known(model)
    rows = found[:QUESTIONS] + [(question, "A fox 77777") for question, _ in found[QUESTIONS:]]
    files = tmp_path_factory.mktemp("asked")
    cells = [{**plain(question, answer), "choices": [answer, "be brief!"]} for question, answer in rows]
    path = json_lines(files / "asked.jsonl", cells)
    build(questions(folder, files, path, {"metric": "perplexity"}), say=lambda _: None)
    return files, path


def known(model: TokenModel) -> list[tuple[str, str]]:
    """Questions with the teacher's replies: first those that hold a number and a word, then others."""
    asked = [f"Name {n}." for n in range(200)]
    features = [model.preprocess(Sample("0", question)) for question in asked]
    replies = [model.decode(tokens).strip() for tokens in model.generate(features, 3)]
    pairs = list(zip(asked, replies, strict=True))
    numbers = [pair for pair in pairs if last_number(pair[1]) is not None and re.fullmatch(r"\d+\W[a-z]+", pair[1])]
    assert len(numbers) >= QUESTIONS, "the model is a formula, and says some"
    return [*numbers[:QUESTIONS], *[pair for pair in pairs if pair not in numbers][:QUESTIONS]]


def questions(folder: Path, files: Path, path: Path, metric: dict[str, Any]) -> Experiment:
    columns = PLAIN | ({"choices": "choices"} if metric["metric"] == "choice" else {})
    data = {"path": str(path), "columns": PLAIN}
    scored = {"data": {"path": str(path), "columns": columns}, **metric}
    if metric["metric"] not in ("choice", "perplexity", "token_accuracy"):
        scored["max_new_tokens"] = 3
    return experiment(folder, files, data, data, scored)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ({"metric": "exact_match"}, 0.5),
        ({"metric": "contains"}, 0.5),
        ({"metric": "numeric"}, 0.5),
        ({"metric": "regex", "pattern": r"(\d+)"}, 0.5),
        ({"metric": "rouge_l"}, 0.5),
        ({"metric": "choice"}, None),
        ({"metric": "perplexity"}, None),
        ({"metric": "token_accuracy"}, None),
    ],
    ids=lambda value: value["metric"] if isinstance(value, dict) else None,
)
def test_a_metric_through_every_stage(
    metric: dict[str, Any], expected: float | None, folder: Path, asked: tuple[Path, Path], tmp_path: Path
) -> None:
    files, path = asked
    config = questions(folder, files, path, metric)
    run = trained(config, tmp_path / "run")
    found = check_scores(config, run)
    assert found["old"] == found["new"]
    if expected is not None:
        assert found["new"] == expected
    elif metric["metric"] == "perplexity":
        assert 1 < found["new"] < 10_000
    else:
        assert 0 <= found["new"] <= 1
    (validated,) = run.read_validation()
    assert validated["new/score"] == pytest.approx(run.finished()["new"]["after"])  # type: ignore[index]
