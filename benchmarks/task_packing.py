"""Task batches packed end to end (`train.pack`) against padded ones: forward and backward pass of a micro-batch.

Texts of mixed lengths, drawn as in the data, so that a padded batch is as wide as its longest. Target: faster than
padding at lengths from 32 to 256; at equal lengths, where there is no padding to save, at most 5 % slower.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

from benchmarks.harness import CPU_TIME, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.texts import samples, teacher_of, write_model
from benchmarks.workload import SHAPES, Shape, mixed_lengths
from craft_ray.data.sample import Sample
from craft_ray.models.base import Batch
from craft_ray.models.causal_lm import CausalLM

LENGTHS = {"32 to 256 tokens": (32, 256), "128 tokens each": (128, 128)}
TARGETS = {"32 to 256 tokens": ">= 1.2", "128 tokens each": ">= 0.95"}


def measure(report: Report, shape: Shape, batch_size: int, bounds: dict[str, tuple[int, int]], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        longest = max(high for _, high in bounds.values())
        model = cast(CausalLM, teacher_of(write_model(Path(temporary) / "model", shape), max_length=longest + 2).model)
        for what, (low, high) in bounds.items():
            lengths = [low] * batch_size if low == high else mixed_lengths(batch_size, low, high)
            features = [
                model.preprocess_task(Sample(sample.id, "", response=sample.prompt))
                for sample in samples([length - 1 for length in lengths], shape)
            ]
            batches = {"padded": model.collate(features), "packed": model.packed_batch(features)}
            times = interleaved({name: Variant(_step(model, batch)) for name, batch in batches.items()}, rounds)
            widths = {name: batch.inputs["input_ids"].numel() for name, batch in batches.items()}
            note = f"{widths['padded']} and {widths['packed']} tokens"
            ratio = times.ratio(*batches)
            report.add(Row.of(f"{batch_size} texts, {what}: padded / packed", ratio, TARGETS.get(what), note))


def _step(model: CausalLM, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        model.module.zero_grad()
        model.task_loss(batch).backward()

    return step


def main() -> None:
    options = arguments(__doc__, rounds=9).parse_args()
    one_thread()
    report = Report("task_packing", CPU_TIME.name, judge=not options.tiny)
    if options.tiny:
        measure(report, SHAPES["tiny"], 4, {"8 to 32 tokens": (8, 32)}, 3)
    else:
        measure(report, SHAPES["10m"], 16, LENGTHS, options.rounds)
    report.finish(options.json)


if __name__ == "__main__":
    main()
