"""The formulas of docs/scaling.md give the bytes and operations of real models, caches, steps and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from craft_pipelines.anchors import build
from craft_pipelines.train import plan_run, train_run
from torch.utils.flop_counter import FlopCounterMode
from transformers import GemmaForCausalLM

from benchmarks.cost_model import (
    MISTRAL,
    PALIGEMMA,
    SMOLLM2,
    Anchor,
    Model,
    Vision,
    checkpoint_bytes,
    padded,
    sent_bytes,
    state_bytes,
    summed_bytes,
)
from benchmarks.scaling import TABLES
from benchmarks.workload import SHAPES, Shape, language_model
from craft_ray.method.gradients import GradientPair
from craft_ray.models import load_model
from tests.support.caches import cache_folder, shards
from tests.support.experiments import Digits

DIGITS = Vision(width=32, layers=2, inner=64, patches=16, patch=2)


def model_of(shape: Shape) -> Model:
    return Model(
        "tiny", width=shape.width, layers=shape.layers, heads=shape.heads, kv_heads=shape.kv_heads,
        head_size=shape.head_size, inner=shape.inner, vocabulary=shape.vocabulary, tied=True,
    )  # fmt: skip


def digits_of(vocabulary: int) -> Model:
    return Model(
        "digits", width=64, layers=4, heads=4, kv_heads=1, head_size=16, inner=128, vocabulary=vocabulary, tied=True,
        vision=DIGITS,
    )  # fmt: skip


def test_parameter_counts_equal_the_published_ones() -> None:
    assert SMOLLM2.parameters == 134_515_008
    assert PALIGEMMA.parameters == 2_923_466_480
    assert MISTRAL.parameters == 7_241_732_096


def test_operations_equal_those_of_a_forward_pass() -> None:
    shape, tokens, samples = SHAPES["tiny"], 24, 3
    found: GemmaForCausalLM = language_model(shape)
    found.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        found(input_ids=torch.ones(samples, tokens, dtype=torch.long), use_cache=False)
    rotary = 2 * tokens * shape.head_size // 2  # the angles, once for all samples
    assert counter.get_total_flops() - samples * model_of(shape).forward_flops(tokens, logits=tokens) in (0, rotary)


def test_a_backward_pass_costs_two_forward_passes() -> None:
    found = language_model(SHAPES["tiny"])
    found.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        loss = found(input_ids=torch.ones(2, 16, dtype=torch.long), use_cache=False).logits.sum()
        forward = counter.get_total_flops()
        loss.backward()
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.01)


class Counting:
    """Two workers that send nothing, but count the bytes to sum."""

    world_size = 2
    summed = 0

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.summed += tensor.numel() * tensor.element_size()

    def start_all_reduce(self, tensor: torch.Tensor) -> Counting:
        self.all_reduce(tensor)
        return self

    def wait(self) -> None:
        pass


class Batch:
    count = 1


def test_a_step_sums_the_two_gradients_and_holds_one_more_copy() -> None:
    parameters = {"a": torch.zeros(40, 50, requires_grad=True), "b": torch.zeros(77, requires_grad=True)}
    gradients, workers = GradientPair(parameters.items()), Counting()
    for row in (0, 1):
        gradients.backward(row, lambda _: sum(p.sum() for p in parameters.values()), [Batch()], workers)  # type: ignore[arg-type, return-value]
    count = 2077
    assert workers.summed == summed_bytes(count)
    held = sum(buffer.numel() * buffer.element_size() for buffer in gradients.buffers)
    assert held == 2 * 4 * padded(count) == state_bytes(count) - 3 * 4 * count
    assert sent_bytes(count, 2) == summed_bytes(count)
    assert sent_bytes(count, 512) == pytest.approx(2 * summed_bytes(count), rel=0.01)


def test_bytes_of_a_real_cache_and_a_real_checkpoint(digits: Digits, tmp_path: Path) -> None:
    """Up to the overhead of Parquet, safetensors and torch files."""
    changes = {"anchors.source.limit": 512, "anchors.rows_per_shard": 512, "anchors.positions": ["all"],
               "train.steps": 2, "craft.positions": ["all"]}  # fmt: skip
    config = digits.experiment(tmp_path, changes)
    manifest = build(config, say=lambda _: None).manifest
    loaded = load_model(config.model, "fp32")
    count = sum(p.numel() for p in loaded.module.parameters())
    digits = digits_of(loaded.module.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    assert digits.parameters == count

    (shard,) = shards(cache_folder(config))
    rows = pq.read_table(shard)
    inputs = sum(len(cell) for column in ("image", "prompt") for cell in rows[column].to_pylist())
    suffix = sum(map(len, rows["suffix"].to_pylist()))
    ids = sum(map(len, rows["id"].to_pylist()))
    vectors = manifest.vectors // 512
    assert vectors * 512 == manifest.vectors, "all prompts of the digits have the same length"
    anchor = Anchor(tokens=vectors, vectors=vectors, layers=2, suffix=0, input_bytes=0, id_bytes=0)
    metadata = pq.read_metadata(shard)
    hidden = sum(
        chunk.total_compressed_size
        for group in range(metadata.num_row_groups)
        for chunk in map(metadata.row_group(group).column, range(metadata.num_columns))
        if chunk.path_in_schema.startswith("hidden_")
    )
    assert hidden == pytest.approx(512 * anchor.hidden_bytes(digits), rel=0.03)  # six more bytes per vector
    stored = 512 * anchor.stored_bytes(digits) + inputs + ids + 4 * suffix
    assert manifest.bytes == pytest.approx(stored, rel=0.05)

    run = plan_run(config)
    train_run(run)
    checkpoint = run.folder.checkpoints / "last"
    weights = (checkpoint / "model" / "model.safetensors").stat().st_size
    state = (checkpoint / "training_state" / "state.pt").stat().st_size
    assert weights + state == pytest.approx(checkpoint_bytes(count), rel=0.05)
    assert state == pytest.approx(2 * weights, rel=0.06)


def test_the_tables_of_the_document_are_those_of_the_script() -> None:
    document = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    for name, make in TABLES.items():
        assert make() in document, f"docs/scaling.md: the table '{name}' is not what benchmarks/scaling.py prints"
