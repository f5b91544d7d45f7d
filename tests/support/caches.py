"""Anchor caches that several tests build, read and damage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from craft_pipelines.anchors import build

from craft_ray.anchors.manifest import Manifest
from craft_ray.config import Experiment, parse_config
from craft_ray.models import load_model
from craft_ray.models.base import Model

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "into", "the", "wood"]


def text_experiment(model: Path, source: Path, folder: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    """Anchors of the byte-level Llama, in shards of 8, in this process."""
    tree = {
        "output_dir": str(folder / "runs"),
        "model": {"kind": "causal_lm", "path": str(model)},
        "task": {"path": str(source), "columns": {"id": "id", "response": "prompt", "prompt": None}},
        "anchors": {
            "source": {"path": str(source), "columns": {"id": "id"}},
            "rows_per_shard": 8,
            "max_new_tokens": 3,
        },
        "craft": {"anchor_cache_dir": str(folder / "anchors"), "anchor_batch_size": 8},
        "train": {"steps": 2, "batch_size": 4},
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test").changed(changes or {})


def prompts(path: Path, lengths: Sequence[int]) -> Path:
    """JSON lines of texts with the given numbers of words."""
    rows = [{"id": f"a{i}", "prompt": " ".join((WORDS * 9)[i % 7 : i % 7 + n])} for i, n in enumerate(lengths)]
    return json_lines(path, rows)


def json_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def built(config: Experiment) -> Manifest:
    return build(config, say=lambda _: None).manifest


def cache_folder(config: Experiment) -> Path:
    assert config.craft.anchor_cache_dir is not None
    return Path(config.craft.anchor_cache_dir)


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.parquet"))


def table(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(shard) for shard in shards(folder))


def teacher(config: Experiment) -> Model:
    return load_model(config.model, config.train.precision)
