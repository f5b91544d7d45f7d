"""The cost of the Ray metrics of a log, relative to its ten steps and to writing the log itself.

The steps are those of the smallest model here (10 M parameters, one text of 32 tokens), where the share is largest.
Target: at most 1 % of the steps.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

from craft_pipelines.console import FileObserver
from craft_pipelines.ray_metrics import RayMetrics
from craft_pipelines.session import join

from benchmarks.harness import CPU_TIME, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.variants import ours
from benchmarks.workload import SHAPES, RetentionTask, language_model
from craft_ray.run.metrics import FIELDS
from craft_ray.run.observers import NullObserver
from craft_ray.tracking.tensorboard import TensorBoardObserver

LOGGED = 10
"""Steps between two logs, as by default."""
REPEATS = 20
"""Logs that are timed together."""


def measure(report: Report, folder: Path, size: str, length: int, rounds: int) -> None:
    product = ours(RetentionTask.of(language_model(SHAPES[size]).train(), 1, length))
    numbers = dict.fromkeys((*FIELDS, "train/lr", "craft/epsilon", "perf/step_s", "perf/data_s"), 0.5)
    steps = itertools.count(1)

    def records() -> list[dict[str, Any]]:
        return [{"step": next(steps), **numbers} for _ in range(LOGGED)]

    metrics = RayMetrics(folder / "run", "hidden", 1000, NullObserver(), enabled=True)
    board = TensorBoardObserver(folder / "events", FileObserver(folder / "progress.jsonl"), enabled=True)
    with metrics, board:
        variants = {
            "steps": Variant(lambda: [product.step() for _ in range(LOGGED)]),
            "ray": Variant(lambda: [metrics.steps(records()) for _ in range(REPEATS)]),
            "log": Variant(lambda: [board.steps(records()) for _ in range(REPEATS)]),
        }
        times = interleaved(variants, rounds)
    ratio = times.ratio("ray", "steps")
    share = [100 / REPEATS * value for value in (ratio.median, ratio.lower, ratio.upper)]
    note = f"{times.median('ray') / REPEATS * 1e6:.0f} us of {times.median('steps') * 1e3:.0f} ms"
    report.add(Row("metrics of a log / its ten steps, percent", share[0], "percent", *share[1:], rounds, "<= 1", note))
    report.add(Row.of("metrics of a log / its JSON lines and TensorBoard events", times.ratio("ray", "log")))


def main() -> None:
    options = arguments(__doc__, rounds=25).parse_args()
    one_thread()
    report = Report("metrics_cost", CPU_TIME.name, judge=not options.tiny)
    join()
    with tempfile.TemporaryDirectory() as folder:
        measure(report, Path(folder), *(("tiny", 16, 3) if options.tiny else ("10m", 32, options.rounds)))
    report.finish(options.json)


if __name__ == "__main__":
    main()
