"""The benchmark of a real chat model, on a tiny one: every variant trains, and its line has what the table shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import chat
from craft_ray.examples import chat as example
from tests.support.tokenizers import TOKENIZERS, chat_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def tiny(folder: Path) -> None:
    chat_model(folder, TOKENIZERS["qwen"]())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))


def test_every_variant_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "SOURCE_CHARS", (40, 120))
    monkeypatch.setattr(chat, "build_model", tiny)
    config = chat.problem(tmp_path)
    short = {f"{section}.{skill}.data.limit": 8 for section in ("validation", "evaluation") for skill in ("old", "new")}
    config = config.changed({**short, "train.steps": 8, "validation.every": 8})
    rows = []
    for variant, changes in list(chat.VARIANTS.items()):
        if "validation.every" in changes:
            monkeypatch.setitem(chat.VARIANTS, variant, changes | {"validation.every": 4})
        rows.append({"variant": variant, "seed": 0, **chat.run(config, variant, 0)})
    kept = {path.name for path in tmp_path.glob("[!.]*")}
    assert kept == {"model", "data", "benchmark-anchors", "expanded"}, "no run is kept"
    for row in rows:
        assert row["steps"] == 8
        assert 0 < row["test"]["agreement"] <= 1
        assert row["test"]["kept"] == pytest.approx(row["test"]["agreement"] / row["test"]["agreement_teacher"])
        assert row["validation"]["kept"] > 0
    assert len({row["test"]["new_nats"] for row in rows}) > len(rows) / 2, "the variants differ"
    for split in ("validation", "test"):
        lines = chat.table(rows, split)
        assert [line.split("|")[1].strip() for line in lines[2:]] == list(chat.VARIANTS)
