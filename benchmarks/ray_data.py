"""Throughput of a build with Ray Data against the same build in this process, start-up excluded.

Both build a small and a large cache in turn; the throughput is the slope, the difference in rows over the difference in
time, so that starting processes and loading models cancel out. One actor with one thread is compared with one loop with
one thread. The time is the wall clock: the work is done in other processes.

Target: at least 0.9 of the plain loop.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from craft_pipelines.anchors import build

from benchmarks.harness import WALL, Ratio, Report, Row, arguments, one_thread
from benchmarks.texts import experiment, samples, write_model, write_samples
from benchmarks.workload import SHAPES, Shape
from craft_ray.config import Experiment

CASES = {
    "about 0.25 ms a row": (Shape(width=64, layers=2, inner=128, heads=2, vocabulary=512, head_size=32), 24),
    "about 1 ms a row": (Shape(width=128, layers=4, inner=256, heads=4, vocabulary=512, head_size=32), 32),
}
SIZES = {"about 0.25 ms a row": (4096, 40960), "about 1 ms a row": (1024, 10240)}


def seconds(config: Experiment, folder: Path, rows: int, workers: int) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    changed = config.changed({"workers.num_workers": workers, "anchors.source.limit": rows})
    start = time.perf_counter()
    build(changed, say=lambda _: None)
    return time.perf_counter() - start


def measure(report: Report, name: str, shape: Shape, length: int, sizes: tuple[int, int], rounds: int) -> None:
    few, many = sizes
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model(folder / "model", shape)
        data = write_samples(folder / "anchors.parquet", samples([length] * many, shape))
        config = experiment(
            folder / "cache",
            model,
            data,
            **{"anchors.modes": ["hidden"], "anchors.positions": ["last_token"], "anchors.rows_per_shard": 1024},
        )
        slopes: dict[int, list[float]] = {0: [], 1: []}
        for workers in slopes:  # starts Ray, and reads every file once
            seconds(config, folder / "cache", few, workers)
        for round_ in range(rounds):
            for workers in (0, 1) if round_ % 2 else (1, 0):
                first, second = (seconds(config, folder / "cache", n, workers) for n in sizes)
                slopes[workers].append((second - first) / (many - few))
    ratio = Ratio.of([plain / ray for plain, ray in zip(slopes[0], slopes[1], strict=True)])
    row_ms = Ratio.of(slopes[0]).median * 1e3
    report.add(Row.of(f"{name}: Ray Data / plain loop", ratio, ">= 0.9", f"plain loop {row_ms:.3f} ms a row"))


def main() -> None:
    options = arguments(__doc__, rounds=5).parse_args()
    one_thread()
    report = Report("ray_data", WALL.name, judge=not options.tiny)
    if options.tiny:
        measure(report, "tiny", SHAPES["tiny"], 8, (64, 256), 1)
    else:
        for name, (shape, length) in CASES.items():
            measure(report, name, shape, length, SIZES[name], options.rounds)
    report.finish(options.json)


if __name__ == "__main__":
    main()
