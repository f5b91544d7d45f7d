"""The retention pass (forward and backward) on hidden states against the one on suffix tokens, and their caches.

Both run as in training, through the mode's own `loss`: `hidden` runs the base model over the prompts, `token_ce` the
full model over prompts and suffixes with logits only at the suffix. The caches are built by the product's teacher.

Targets: `hidden` 1.25 times as fast at a vocabulary of 8k and 2.5 times at 51k.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from craft_pipelines.anchors import build

from benchmarks.harness import CPU_TIME, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.texts import experiment, samples, teacher_of, write_model, write_samples
from benchmarks.workload import SHAPES, Shape
from craft_ray.anchors.build import build_shard
from craft_ray.config import Experiment
from craft_ray.models import load_model
from craft_ray.models.base import Model
from craft_ray.retention.constraints import open_mode

TARGETS = {8192: ">= 1.25", 51200: ">= 2.5"}
MODES = ("hidden", "token_ce")


def retention_pass(config: Experiment, model: Model, mode: str, rows: int) -> Callable[[], None]:
    retention = open_mode(config.changed({"craft.retention_mode": mode, "craft.epsilon_start": 0.05}), model, None)
    batch = retention.batch(range(rows)).to(model.device)

    def run() -> None:
        model.module.zero_grad(set_to_none=True)
        retention.loss(batch).backward()

    return run


def measure(report: Report, shape: Shape, prompt: int, suffix: int, rows: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model_folder = write_model(folder / "model", shape)
        texts = samples([prompt] * rows, shape)
        config = experiment(
            folder / "cache",
            model_folder,
            write_samples(folder / "anchors.parquet", texts),
            **{"anchors.max_new_tokens": suffix},
        )
        build(config, say=lambda _: None)
        model = load_model(config.model, "fp32")
        passes = {mode: Variant(retention_pass(config, model, mode, rows)) for mode in MODES}
        times = interleaved(passes, 2 * rounds)
        where = f"vocabulary {shape.vocabulary}, {prompt} prompt and {suffix} suffix tokens"
        target = TARGETS.get(shape.vocabulary)
        report.add(Row.of(f"{where}: pass, token_ce / hidden", times.ratio("token_ce", "hidden"), target))

        def builds(mode: str) -> Callable[[], None]:
            teacher = teacher_of(model_folder, modes=(mode,), max_new_tokens=suffix)

            def run() -> None:
                (folder / "shard.parquet").unlink(missing_ok=True)
                build_shard(teacher, cast(Any, texts), range(rows), folder / "shard.parquet")

            return run

        times = interleaved({mode: Variant(builds(mode)) for mode in MODES}, rounds)
        report.add(Row.of(f"{where}: cache, token_ce / hidden", times.ratio("token_ce", "hidden")))


def main() -> None:
    options = arguments(__doc__, rounds=5, rows=8, prompt=64).parse_args()
    one_thread()
    report = Report("retention_modes", CPU_TIME.name, judge=not options.tiny)
    if options.tiny:
        measure(report, SHAPES["tiny"], 16, 4, 2, 3)
    else:
        for vocabulary in (8192, 51200):
            for suffix in (16, 64):
                shape = replace(SHAPES["10m"], vocabulary=vocabulary)
                measure(report, shape, options.prompt, suffix, options.rows, options.rounds)
    report.finish(options.json)


if __name__ == "__main__":
    main()
