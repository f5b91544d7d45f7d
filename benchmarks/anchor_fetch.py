"""Fetching a batch of anchors against the step of the smallest model, the one of the digits demo; size of the cache.

Targets: the vectors of 32 anchors in at most 0.5 % of the step; in Parquet at most 0.51 of their size in float32.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import torch
from craft_pipelines.anchors import build
from craft_pipelines.demo import CONFIGS

from benchmarks.harness import CPU_TIME, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.texts import samples, teacher_of, write_model
from benchmarks.variants import Ours
from benchmarks.workload import Shape
from craft_ray.anchors.build import build_shard
from craft_ray.anchors.manifest import SHARDS
from craft_ray.config import load_config
from craft_ray.data.source import open_source
from craft_ray.examples import digits
from craft_ray.models import load_model
from craft_ray.quiet import quiet_libraries
from craft_ray.retention.constraints import open_mode

BATCH = 32
REPEATS = 64
"""Fetches that are timed together: a single one is too short for the resolution of a clock."""


def hidden_size(shards: Iterable[Path]) -> float:
    """Bytes of hidden states in Parquet over those of the same numbers in float32."""
    stored = numbers = 0
    for shard in shards:
        metadata = pq.read_metadata(shard)
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                if column.path_in_schema.startswith("hidden_"):
                    stored += column.total_compressed_size
                    numbers += column.num_values
    return stored / (4 * numbers)


def measure(report: Report, folder: Path, rounds: int, anchors_of: int) -> None:
    digits.build_model(folder / "model")
    digits.write_data(folder / "data")
    changes = {"model.path": str(folder / "model"), "workers.num_workers": 0, "anchors.source.limit": anchors_of}
    config = load_config(CONFIGS / "demo_digits.yaml", base=folder).changed(changes)
    build(config, say=lambda _: None)
    model = load_model(config.model, config.train.precision)
    source = open_source(config.task, "task")
    features = [model.preprocess_task(source[row]) for row in range(BATCH)]
    anchors = open_mode(config, model, None)
    order = torch.randperm(len(anchors.anchors), generator=torch.Generator().manual_seed(0)).tolist()
    batches = itertools.cycle([order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)])
    for row in order:
        anchors.batch([row])  # kept from here on, as after the first epoch
    product = Ours(
        model.module.named_parameters(),
        model.task_loss,
        anchors.loss,
        model.collate(features),
        anchors.batch(order[:BATCH]),
    )

    def vectors() -> None:
        for rows in itertools.islice(batches, REPEATS):
            anchors.teacher_vectors(rows)

    def whole() -> None:
        for rows in itertools.islice(batches, REPEATS):
            anchors.batch(rows)

    variants = {"step": Variant(product.step), "vectors": Variant(vectors), "batch": Variant(whole)}
    times = interleaved(variants, rounds)
    for name, what, target in (
        ("vectors", "vectors of 32 anchors / a step, percent", "<= 0.5"),
        ("batch", "the whole batch of 32, inputs kept / a step, percent", None),
    ):
        ratio = times.ratio(name, "step")
        values = [100 / REPEATS * v for v in (ratio.median, ratio.lower, ratio.upper)]
        note = f"{times.median(name) / REPEATS * 1e6:.0f} us of {times.median('step') * 1e3:.1f} ms"
        report.add(Row(what, values[0], "percent", values[1], values[2], ratio.rounds, target, note))
    size = hidden_size((folder / "anchors" / SHARDS).glob("*.parquet"))
    report.add(Row("hidden column of this cache (width 64) / float32", size, target="<= 0.51"))


def measure_size(report: Report, folder: Path, rows: int) -> None:
    """Each vector takes a few bytes for its offset, so a wider one is closer to one half."""
    shape = Shape(width=256, layers=2, inner=256, heads=2, vocabulary=1024)
    teacher = teacher_of(write_model(folder / "wide", shape))
    build_shard(teacher, cast(Any, samples([32] * rows, shape)), range(rows), folder / "wide.parquet")
    size = hidden_size([folder / "wide.parquet"])
    report.add(Row("hidden column of a cache of width 256 / float32", size, target="<= 0.51"))


def main() -> None:
    options = arguments(__doc__, rounds=25, anchors=1024).parse_args()
    one_thread()
    quiet_libraries()
    report = Report("anchor_fetch", CPU_TIME.name, judge=not options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        rounds, anchors = (3, 64) if options.tiny else (options.rounds, options.anchors)
        measure(report, Path(folder), rounds, anchors)
        measure_size(report, Path(folder), anchors)
    report.finish(options.json)


if __name__ == "__main__":
    main()
