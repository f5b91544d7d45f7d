"""A folder with a Gemma-shaped model and a tokenizer of one token per word, and texts for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.workload import Shape, language_model, mixed_lengths, random_texts
from craft_ray.anchors.schema import CacheSchema
from craft_ray.anchors.teacher import Teacher
from craft_ray.config import AnchorsConfig, AutoData, Experiment, ModelConfig, Precision, parse_config
from craft_ray.data.sample import Sample
from craft_ray.models import load_model
from craft_ray.quiet import quiet_libraries

SPECIAL = ["<pad>", "<bos>", "<eos>"]


def write_model(folder: Path, shape: Shape) -> Path:
    """Write random weights into an ordinary model folder."""
    quiet_libraries()
    words = {word: number for number, word in enumerate([*SPECIAL, *map(word_of, range(3, shape.vocabulary))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos = SPECIAL
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    fast.save_pretrained(folder)
    language_model(shape).save_pretrained(folder)
    return folder


def word_of(token: int) -> str:
    return f"w{token}"


def samples(lengths: Sequence[int], shape: Shape) -> list[Sample]:
    """Prompts of these lengths in tokens."""
    texts = random_texts(lengths, shape.vocabulary)
    return [Sample(id=f"{i:06d}", prompt=" ".join(map(word_of, ids.tolist()))) for i, ids in enumerate(texts)]


def mixed_samples(count: int, shape: Shape, low: int, high: int) -> list[Sample]:
    return samples(mixed_lengths(count, low, high), shape)


def write_samples(path: Path, rows: Sequence[Sample]) -> Path:
    pq.write_table(pa.table({"id": [s.id for s in rows], "prompt": [s.prompt for s in rows]}), path)
    return path


def experiment(folder: Path, model: Path, data: Path, **changes: Any) -> Experiment:
    """An experiment that builds its cache in `folder`, in this process unless `changes` say otherwise."""
    columns = {"id": "id", "prompt": "prompt"}
    tree = {
        "model": {"path": str(model)},
        "task": {"path": str(data), "columns": columns},
        "anchors": {"source": {"path": str(data), "columns": columns}},
        "craft": {"anchor_cache_dir": str(folder)},
        "train": {"steps": 1},
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "benchmark").changed(changes)


def teacher_of(
    folder: Path,
    *,
    precision: Precision = "fp32",
    dtype: str = "float32",
    modes: tuple[str, ...] = ("hidden",),
    positions: tuple[str, ...] = ("all",),
    max_length: int = 512,
    **settings: Any,
) -> Teacher:
    """The product's teacher for a model folder."""
    quiet_libraries()
    model = load_model(ModelConfig(path=str(folder), dtype=dtype, max_length=max_length), precision)  # type: ignore[arg-type]
    last = model.num_hidden_states - 1
    schema = CacheSchema(modes, positions, (last - 1, last), model.hidden_size, "float16", "raw")
    return Teacher(model, schema, AnchorsConfig(source=AutoData(path="unused"), modes=modes, **settings))  # type: ignore[arg-type]
