"""Columns by reference: values within columns, texts of several, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from craft_ray.config import parse_config
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, CraftError, DataError

ROWS: list[dict[str, Any]] = [
    {"q": "Who?", "context": "C0", "answer": {"text": "me", "spans": [{"at": 1.50}, {"at": 2}]}, "a.b": "flat"},
    {"q": "{Why}?", "context": "C1", "answer": {"text": "so", "spans": [{"at": 3}]}, "a.b": "plain"},
]


def written(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def opened(path: Path, **columns: Any) -> Source:
    tree = {"model": {"path": "org/m"}, "task": {"path": str(path), "columns": columns}, "train": {"steps": 1}}
    config = parse_config(tree, "test")
    return open_source(config.task, "task")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_values_within_columns_and_texts_of_several(tmp_path: Path, kind: str) -> None:
    source = opened(written(tmp_path, kind), prompt="{context}: {q} {{sic}}", response="answer.text")
    assert [sample.prompt for sample in source] == ["C0: Who? {sic}", "C1: {Why}? {sic}"]
    assert [sample.response for sample in source] == ["me", "so"]
    assert opened(written(tmp_path, kind), prompt="q", response="answer.spans.0.at")[1].response in ("3", "3.0")


def test_a_number_within_a_column_keeps_its_digits(tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text('{"q": "?", "answer": {"n": 1.50}}\n')
    assert opened(path, prompt="q", response="answer.n")[0].response == "1.50"
    assert opened(path, prompt="q", response="{answer.n} €")[0].response == "1.50 €"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_that_has_the_name_comes_first(tmp_path: Path, kind: str) -> None:
    rows = [{"a": {"b": "within"}, "a.b": "named", "{a}": "braces", "p": "x"}]
    source = opened(written(tmp_path, kind, rows), prompt="p", response="a.b")
    assert source[0].response == "named"
    assert opened(written(tmp_path, kind, rows), prompt="{a}", response="p")[0].prompt == "braces"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"prompt": "{question}", "response": "q"}, r"task\.columns\.prompt is '\{question\}' with \{question\}, but"),
        (
            {"prompt": "q", "response": "reply.text"},
            r"task\.columns\.response is 'reply\.text', but .* has the columns",
        ),
        ({"prompt": "{q", "response": "q"}, r"task\.columns\.prompt is '\{q', whose braces do not match"),
        ({"prompt": "q", "response": "q", "id": "answer.text"}, r"task\.columns\.id is 'answer\.text', but"),
    ],
)
def test_a_reference_to_no_column_is_refused(tmp_path: Path, columns: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        opened(written(tmp_path, "jsonl"), **columns)


@pytest.mark.parametrize(
    ("response", "line"),
    [
        ("answer.spans.1.at", r"row 1: column 'answer' holds .* which has no '1', and 'answer\.spans\.1\.at' asks"),
        ("answer.texts", r"row 0: column 'answer' holds .* which has no 'texts'"),
        ("answer.spans", r"row 0: column 'answer\.spans' holds .* \(a list\)"),
        ("q.text", r"row 0: column 'q' holds 'Who\?', which has no 'text'"),
    ],
)
def test_a_row_without_the_value_is_refused_by_name(tmp_path: Path, response: str, line: str) -> None:
    source = opened(written(tmp_path, "jsonl"), prompt="q", response=response)
    with pytest.raises(DataError, match=line) as caught:
        list(source)
    assert isinstance(caught.value, CraftError)
    assert "\n" not in caught.value.message
