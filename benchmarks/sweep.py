"""The cost of a sweep, and whether its findings hold on test data.

Costs: 16 trials whose run is a no-op, in a separate process, from the start of Python to the last line; and the time
between the ends of two such trials on one actor. The same with runs of a single real step, which load the model and
open the cache.

Findings, on the digits demo: 16 settings with ASHA, and the same 16 all run to the end; then the best one is trained on
three new seeds and scored on test data, which the sweep has not used. Concurrent trials share the cores, so the time is
the wall clock.

Targets: at most 30 s and 0.5 s; at most 300 s for the sweep, and for the whole demo with a sweep of four trials at its
end; at least half stopped early, at most 1 point of the new score lost; the bound kept on test data by each seed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from craft_pipelines.session import join
from craft_pipelines.sweep.driver import plan_sweep, search
from craft_pipelines.sweep.runs import in_process
from craft_pipelines.sweep.tracking import SweepTracking

from benchmarks.harness import WALL, Report, Row, arguments, one_thread
from craft_ray.config import Experiment, dump_config, load_config
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import Record
from craft_ray.run.training import Run
from craft_ray.sweep.space import load_space

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "pipelines" / "configs" / "demo_digits.yaml"
TRIALS = 16
FRESH_SEEDS = (101, 102, 103)
BOUND = 0.95


def nothing(config: Experiment, folder: RunFolder) -> Generator[Record]:
    """A run without a step."""
    yield {"step": config.train.steps, "new/score": 0.5, "old/ratio": 1.0}


def one_step(config: Experiment, folder: RunFolder) -> Generator[Record]:
    """A run of one step in this process; the time of step and validation is recorded with it."""
    validate, looked = Run.validate, []

    def timed(run: Run) -> Record:
        started = time.perf_counter()
        record = validate(run)
        looked.append(time.perf_counter() - started)
        return record

    Run.validate = timed  # type: ignore[method-assign]
    try:
        yield from in_process(config, folder)
    finally:
        Run.validate = validate  # type: ignore[method-assign]
        stepped = sum(record["perf/step_s"] for record in folder.read_metrics())
        (folder.path / "work.json").write_text(json.dumps(stepped + sum(looked)))


def child(folder: Path, demo: Path, count: int, real: bool) -> None:
    """A sweep whose trials have no step, or one. Writes the times of their ends, by the clock of the driver."""
    ends: list[float] = []
    changes: dict[str, Any] = {
        "sweep.samples": count,
        "sweep.scheduler": "none",
        "validation.every": 0,
        "train.steps": 1,
    }
    changes["sweep.parallel"] = 2
    small = {"train.warmup_steps": 0, "validation.old.data.limit": 8, "validation.new.data.limit": 8}
    config = load_config(CONFIG, base=demo).changed({**changes, **small})
    sweep, plan = plan_sweep(config, load_space("craft"), folder)
    join()
    search(
        sweep,
        plan,
        SweepTracking(sweep, plan, print),
        lambda _: ends.append(time.time()),
        one_step if real else nothing,
    )
    (folder / "ends.json").write_text(json.dumps(ends))


def measure_costs(report: Report, demo: Path, scratch: Path, count: int) -> None:
    for real, what in ((False, "no-op"), (True, "one real step")):
        folder = scratch / what.replace(" ", "-")
        command = [sys.executable, "-m", "benchmarks.sweep", "--child", str(folder), "--demo", str(demo)]
        started = time.time()
        subprocess.run([*command, "--trials", str(count), *(["--real"] if real else [])], cwd=ROOT, check=True)
        seconds = time.time() - started
        ends = json.loads((folder / "ends.json").read_text())
        # Two actors take turns, so each ends a trial with every second line.
        gaps = sorted(later - earlier for earlier, later in zip(ends[2:-2], ends[4:], strict=True)) or [0.0]
        work = [json.loads(path.read_text()) for path in folder.glob("trials/*/seed0/work.json")] or [0.0]
        gaps = [gap - statistics.median(work) for gap in gaps]
        target = None if real else "<= 30"
        report.add(Row(f"{count} trials of {what}, start of Python and Ray included", seconds, "s", target=target))
        report.add(
            Row(
                f"a trial of {what} beyond step and validation, not an actor's first", statistics.median(gaps), "s",
                gaps[len(gaps) // 4], gaps[3 * len(gaps) // 4], len(gaps), target="<= 0.5",
                note=f"step and validation {statistics.median(work):.2f} s",
            )
        )  # fmt: skip


def craft_ray(*arguments: str) -> float:
    """The seconds that a command takes."""
    started = time.time()
    done = subprocess.run([str(Path(sys.executable).parent / "craft-ray"), *arguments], check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"craft-ray {' '.join(arguments)} ended with {done.returncode}")
    return time.time() - started


def swept(demo: Path, folder: Path, count: int, *overrides: str) -> tuple[float, list[dict[str, Any]]]:
    """Seconds and rows of a sweep over the demo's problem."""
    config = scratch_config(demo, folder.parent)
    seconds = craft_ray(
        "sweep", str(config), "--space", "craft", "--samples", str(count), "--out", str(folder), *overrides
    )
    return seconds, pq.read_table(folder / "trials.parquet").to_pylist()


def scratch_config(demo: Path, scratch: Path) -> Path:
    """The demo's config with its paths resolved."""
    path = scratch / "digits.yaml"
    path.write_text(dump_config(load_config(CONFIG, base=demo).changed({"output_dir": str(scratch / "runs")})))
    return path


def measure_findings(report: Report, demo: Path, scratch: Path, count: int, overrides: list[str]) -> None:
    seconds, early = swept(demo, scratch / "asha", count, *overrides)
    full_seconds, full = swept(demo, scratch / "all", count, "sweep.scheduler=none", *overrides)
    report.add(Row(f"{count} trials of the digits demo with ASHA", seconds, "s", target="<= 300"))
    report.add(Row("the same, all run to the end", full_seconds, "s"))
    report.add(Row("time with ASHA over time without", seconds / full_seconds))
    stopped = sum(row["status"] == "stopped" for row in early)
    report.add(Row("trials stopped early, of all", stopped / len(early), target=">= 0.5"))
    best = [max((row["value"] for row in rows if row["rank"] == 1), default=0.0) for rows in (early, full)]
    report.add(Row("new score of the best, ASHA", best[0], note=f"all run to the end: {best[1]:.4g}"))
    report.add(Row("points of the new score lost to ASHA", 100 * (best[1] - best[0]), "points", target="<= 1"))
    for seed in FRESH_SEEDS[: 1 if count < TRIALS else None]:
        craft_ray("train", str(scratch / "asha" / "best.yaml"), f"seed={seed}", f"output_dir={scratch / 'fresh'}")
    results = [json.loads(path.read_text()) for path in sorted((scratch / "fresh").glob("*/result.json"))]
    kept = [result["old"]["ratio"] for result in results]
    learnt = [result["new"]["after"] for result in results]
    note = f"seeds {', '.join(f'{value:.4f}' for value in kept)}"
    report.add(Row("old skill kept on test data, minimum of the new seeds", min(kept), target=f">= {BOUND}", note=note))
    report.add(Row("new score on test data, mean of the new seeds", statistics.fmean(learnt)))


def main() -> None:
    parser = arguments(__doc__, trials=TRIALS)
    parser.add_argument("--demo", type=Path, help="folder of a digits demo; without it, a demo is run and timed")
    parser.add_argument("--child", type=Path, help="internal: a sweep without work into this folder")
    parser.add_argument("--real", action="store_true", help="internal: with one step")
    parser.add_argument("overrides", nargs="*", help="key=value for the sweeps of the findings")
    options = parser.parse_args()
    one_thread()
    if options.child is not None:
        child(options.child, options.demo, options.trials, options.real)
        return
    report = Report("sweep", WALL.name, judge=not options.tiny)
    count = 4 if options.tiny else options.trials
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        demo = options.demo
        if demo is None:
            demo = scratch / "demo"
            seconds = craft_ray("demo", *(["--quick"] if options.tiny else []), "--out", str(demo))
            report.add(Row("the digits demo, its sweep of 4 trials included", seconds, "s", target="<= 300"))
        demo = demo.absolute()
        measure_costs(report, demo, scratch, count)
        if not options.tiny:
            measure_findings(report, demo, scratch, count, options.overrides)
    report.finish(options.json)


if __name__ == "__main__":
    main()
