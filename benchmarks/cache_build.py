"""Building the anchor cache against the loop that one would write first, on texts of 64 to 512 tokens.

The loop runs the full causal model over batches in the order of the data, padded to the model's 512 tokens or to the
longest of the batch, keeps the last two hidden states of every token and writes them with torch.save. The product
runs `build_shard`: base model, packs without padding, Parquet. Both start from text. The loop computes in float32.

Targets: 2 times as fast at a vocabulary of 8k, 4 times at 51k; with bf16 5 and 9 times; memory independent of rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.harness import CPU_TIME, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.memory import peak_in_process
from benchmarks.texts import mixed_samples, teacher_of, write_model
from benchmarks.workload import SHAPES, Shape
from craft_ray.anchors.build import build_shard
from craft_ray.anchors.teacher import Teacher
from craft_ray.data.sample import Sample

BATCH = 8
LENGTHS = (64, 512)
TARGETS = {8192: ("8k", ">= 2", ">= 5"), 51200: ("51k", ">= 4", ">= 9")}
MEMORY_SHAPE = Shape(width=128, layers=2, inner=256, heads=2, vocabulary=1024)


@torch.no_grad()
def naive_build(teacher: Teacher, rows: Sequence[Sample], folder: Path, width: int | None) -> None:
    """`width` None pads to the longest of each batch."""
    model = cast(Any, teacher.model)
    for start in range(0, len(rows), BATCH):
        texts = [sample.prompt for sample in rows[start : start + BATCH]]
        padding = {"padding": True} if width is None else {"padding": "max_length", "max_length": width}
        inputs = model.tokenizer(texts, return_tensors="pt", **padding)
        states = model.module(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        ).hidden_states
        lengths = inputs["attention_mask"].sum(1).tolist()
        kept = [torch.stack([s[i, :n] for s in states[-2:]]) for i, n in enumerate(lengths)]
        torch.save(kept, folder / f"{start:06d}.pt")


def measure(report: Report, shape: Shape, rows: Sequence[Sample], rounds: int, high: int) -> None:
    name, target, target_bf16 = TARGETS.get(shape.vocabulary, (str(shape.vocabulary), None, None))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model(folder / "model", shape)
        fp32 = teacher_of(model, max_length=high)
        teachers = {
            "packed fp32": fp32,
            "padded fp32": teacher_of(model, max_length=high, pack_tokens=0),
            "packed, precision bf16": teacher_of(model, max_length=high, precision="bf16"),
            "packed, model.dtype bfloat16": teacher_of(model, max_length=high, dtype="bfloat16"),
        }
        fp32.model.module.eval()
        variants = {
            f"naive, padded to {high}": Variant(lambda: naive_build(fp32, rows, folder, high)),
            "naive, padded to the longest of a batch": Variant(lambda: naive_build(fp32, rows, folder, None)),
        } | {what: Variant(_builds(teacher, rows, folder)) for what, teacher in teachers.items()}
        times = interleaved(variants, rounds)
    unpadded = sum(len(sample.prompt.split()) for sample in rows)
    for naive in list(variants)[:2]:
        for what in teachers:
            aim = {"packed fp32": target}.get(what, target_bf16 if "bf" in what else None) if "512" in naive else None
            speed = f"{unpadded / times.median(what):.0f} tokens/s"
            report.add(Row.of(f"{name}: {naive} / {what}", times.ratio(naive, what), aim, speed))


def _builds(teacher: Teacher, rows: Sequence[Sample], folder: Path) -> Callable[[], None]:
    def build() -> None:
        (folder / "shard.parquet").unlink(missing_ok=True)
        build_shard(teacher, cast(Any, rows), range(len(rows)), folder / "shard.parquet")

    return build


def build_alone(model: Path, count: int, high: int) -> None:
    """Runs in a separate process, whose peak memory is measured."""
    one_thread()
    rows = mixed_samples(count, MEMORY_SHAPE, high // 8, high)
    teacher = teacher_of(model, max_length=high)
    with tempfile.TemporaryDirectory() as temporary:
        build_shard(teacher, cast(Any, rows), range(count), Path(temporary) / "shard.parquet")


def measure_memory(report: Report, count: int, high: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = write_model(Path(temporary) / "model", MEMORY_SHAPE)
        few, many = (peak_in_process(build_alone, model, n, high) for n in (count, 4 * count))
    note = f"{few / 2**20:.0f} and {many / 2**20:.0f} MiB"
    report.add(Row(f"peak memory of {4 * count} rows / of {count} rows", many / few, target="<= 1.1", note=note))


def main() -> None:
    options = arguments(__doc__, rounds=7, rows=48).parse_args()
    one_thread()
    report = Report("cache_build", CPU_TIME.name, judge=not options.tiny)
    if options.tiny:
        rows = mixed_samples(8, SHAPES["tiny"], 8, 64)
        measure(report, SHAPES["tiny"], rows, 3, 64)
        measure_memory(report, 16, 64)
    else:
        for vocabulary in TARGETS:
            shape = replace(SHAPES["10m"], vocabulary=vocabulary)
            measure(report, shape, mixed_samples(options.rows, shape, *LENGTHS), options.rounds, LENGTHS[1])
        measure_memory(report, 1024, LENGTHS[1])
    report.finish(options.json)


if __name__ == "__main__":
    main()
