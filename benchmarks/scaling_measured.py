"""Scale as far as one machine goes: memory of a build by rows, and throughput at one and at two workers.

Memory: the highest resident set of the driver and of the process that writes shards, with a new driver for each number
of rows. Prompts have one token and the teacher has one layer, so that the rows dominate.

Throughput: one worker and two take turns. For a build it is the difference in rows between a small and a large cache
over the difference in time, so that starting processes cancels out; for a run it is the median time of its steps, on
the same global batches. The time is the wall clock: the work is done in other processes.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import WALL, Ratio, Report, Row, arguments, one_thread
from benchmarks.memory import peak_bytes
from benchmarks.ray_data import seconds
from benchmarks.texts import experiment, samples, write_model, write_samples
from benchmarks.workload import SHAPES, Shape
from craft_ray.config import Experiment

MEMORY_SHAPE = Shape(width=16, layers=1, inner=32, heads=1, vocabulary=64, head_size=16)
SIZES = (10_000, 100_000, 1_000_000)
POLL_S = 0.5
MIB = 1 << 20

BUILD_SHAPE, BUILD_TOKENS, BUILD_ROWS = SHAPES["10m"], 64, (256, 1280)
STEPS = 12


# -- memory


def one_token_prompts(path: Path, rows: int) -> Path:
    """A source of `rows` rows, written a part at a time."""
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 100_000):
            part = range(start, min(start + 100_000, rows))
            writer.write_table(pa.table({"id": [f"{i:08d}" for i in part], "prompt": ["w5"] * len(part)}, schema))
    return path


def writer_peak(stop: threading.Event, found: dict[str, int]) -> None:
    """The peak memory of any child process that writes shards."""
    while not stop.wait(POLL_S):
        for process in psutil.Process().children(recursive=True):
            try:
                if any("ShardWriter" in part for part in process.cmdline()):
                    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
                    found["writer"] = max(found.get("writer", 0), peak)
            except (psutil.NoSuchProcess, OSError, StopIteration):
                continue


def build_and_watch(sender: Any, config: Experiment) -> None:
    """Runs in a separate driver, which reports its peak memory and its writer's."""
    from craft_pipelines.anchors import build

    one_thread()
    found: dict[str, int] = {}
    stop = threading.Event()
    threading.Thread(target=writer_peak, args=(stop, found), daemon=True).start()
    build(config, say=lambda _: None)
    stop.set()
    sender.send(found | {"driver": peak_bytes()})


def peaks(config: Experiment) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=build_and_watch, args=(sender, config))
    process.start()
    sender.close()
    found: dict[str, int] = receiver.recv()
    process.join()
    return found


def measure_memory(report: Report, sizes: Sequence[int], rows_per_shard: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        model = write_model(folder / "model", MEMORY_SHAPE)
        first: dict[str, int] = {}
        for rows in sizes:
            data = one_token_prompts(folder / f"{rows}.parquet", rows)
            changes = {
                "workers.num_workers": 1,
                "anchors.modes": ["hidden"],
                "anchors.positions": ["last_token"],
                "anchors.rows_per_shard": rows_per_shard,
            }
            found = peaks(experiment(folder / f"cache{rows}", model, data, **changes))
            first = first or found
            for who, peak in sorted(found.items()):
                what = f"peak memory of the {who}, {rows} rows / {sizes[0]} rows"
                report.add(Row(what, peak / first[who], note=f"{peak / MIB:.0f} MiB"))


# -- throughput


def in_turns(rounds: int, measure: Callable[[int], float]) -> Ratio:
    """The time of one worker over that of two, one ratio per round."""
    ratios = []
    for round_ in range(rounds):
        times = {workers: measure(workers) for workers in ((1, 2) if round_ % 2 else (2, 1))}
        ratios.append(times[1] / times[2])
    return Ratio.of(ratios)


def measure_builds(report: Report, shape: Shape, tokens: int, sizes: tuple[int, int], rounds: int) -> None:
    few, many = sizes
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_samples(folder / "anchors.parquet", samples([tokens] * many, shape))
        changes = {"anchors.modes": ["hidden"], "anchors.positions": ["last_token"], "anchors.rows_per_shard": 32}
        config = experiment(folder / "cache", write_model(folder / "model", shape), data, **changes)

        def slope(actors: int) -> float:
            chosen = config.changed({"anchors.actors": actors})
            first, second = (seconds(chosen, folder / "cache", rows, workers=1) for rows in sizes)
            return (second - first) / (many - few)

        slope(2)  # starts Ray, and reads every file once
        report.add(Row.of("cache build: throughput of two teachers over one", in_turns(rounds, slope)))


def measure_training(report: Report, shape: Shape, tokens: int, steps: int, rounds: int) -> None:
    from craft_pipelines.train import plan_run, run_on_trainer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["CRAFT_RAY_CACHE"] = str(folder / "expanded")
        rows = samples([tokens] * 64, shape)
        data = write_samples(folder / "data.parquet", rows)
        changes = {
            "anchors.modes": ["hidden"], "anchors.positions": ["last_token"], "task.columns.response": "prompt",
            "task.columns.prompt": None, "output_dir": str(folder / "runs"), "train.steps": steps,
            "train.batch_size": 8, "train.keep_checkpoints": 0, "craft.anchor_batch_size": 8,
        }  # fmt: skip
        config = experiment(folder / "cache", write_model(folder / "model", shape), data, **changes)
        from craft_pipelines.anchors import build

        build(config, say=lambda _: None)
        count = 0

        def step_s(workers: int) -> float:
            nonlocal count
            count += 1
            run = plan_run(config.changed({"name": f"run{count}", "workers.num_workers": workers}))
            run_on_trainer([run])
            return statistics.median(record["perf/step_s"] for record in run.folder.read_metrics()[2:])

        report.add(Row.of("training: steps per second of two workers over one", in_turns(rounds, step_s)))


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows of the caches in the memory part")
    parser.add_argument("--only", choices=("memory", "builds", "training"), help="only this part")
    options = parser.parse_args()
    one_thread()
    report = Report("scaling_measured", WALL.name, judge=not options.tiny)
    tiny = SHAPES["tiny"]
    if options.only in (None, "memory"):
        measure_memory(report, (64, 256) if options.tiny else options.sizes, 64 if options.tiny else 8192)
    if options.only in (None, "builds"):
        chosen = (tiny, 8, (64, 256), 1) if options.tiny else (BUILD_SHAPE, BUILD_TOKENS, BUILD_ROWS, options.rounds)
        measure_builds(report, *chosen)
    if options.only in (None, "training"):
        chosen_run = (tiny, 8, 4, 1) if options.tiny else (BUILD_SHAPE, BUILD_TOKENS, STEPS, options.rounds)
        measure_training(report, *chosen_run)
    report.finish(options.json)


if __name__ == "__main__":
    main()
