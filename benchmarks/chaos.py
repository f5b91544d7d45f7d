"""Kills at random moments, and whether each stage still has the result of its undisturbed run.

A cluster of two nodes on this machine builds a cache with two teachers, trains with two workers, and sweeps over
trials of one worker each. First each stage runs undisturbed. Then, for each kill, one of them runs again, and at a
random moment it loses a worker process, a node with all its processes (another one joins), or its driver (the same
command is run again, or `--resume`). One kill in four happens before the first shard, step or validation, the others
during the work. These must be the same, bit for bit: the rows and the hash of a cache; the weights and the log of a
run; settings, reports and outcomes of the trials of a sweep, each of them once.

    python -m benchmarks.chaos                                  # 20 kills, into benchmarks/chaos.log
    python -m benchmarks.chaos --kills 3 --seed 1 --stage training --log some.log
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.nodes import Cluster
from craft_ray.anchors.manifest import read_manifest
from craft_ray.config import Experiment, dump_config, parse_config
from craft_ray.errors import NOT_MET
from craft_ray.examples import digits
from craft_ray.run.folder import RunFolder
from craft_ray.storage.files import checksum
from craft_ray.sweep.trials import SweepFolder

LOG = Path(__file__).parent / "chaos.log"
KINDS = ("worker", "node", "driver")
TIMEOUT_S = 900.0
BEFORE_WORK = 0.25
"""Fraction of the kills before the first shard, step or validation: while processes start and models load."""


class Stage(ABC):
    """A command of craft-ray that is run repeatedly, each time into another folder."""

    name: str
    titles: tuple[str, ...]
    """Words in the titles of its worker processes."""

    def __init__(self, config: Experiment) -> None:
        self.config = config

    @abstractmethod
    def command(self, home: Path) -> list[str]:
        """The command that starts the stage, or resumes it after a kill."""

    @abstractmethod
    def progress(self, home: Path) -> int:
        """Shards, steps or validations so far."""

    @abstractmethod
    def result(self, home: Path) -> Any:
        """What must be the same as in the undisturbed run."""

    def written(self, home: Path, changes: dict[str, Any]) -> str:
        home.mkdir(parents=True, exist_ok=True)
        path = home / "run.yaml"
        path.write_text(dump_config(self.config.changed(changes)))
        return str(path)

    def start(self, home: Path, cluster: Cluster) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "craft_pipelines.cli", *self.command(home)], text=True, env=cluster.env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def workers(self, cluster: Cluster) -> list[list[psutil.Process]]:
        """Its worker processes on each node."""
        return [[p for title in self.titles for p in node.processes(title)] for node in cluster.nodes]


class Cache(Stage):
    """`craft-ray anchors build` with two teachers."""

    name = "cache"
    titles = ("ShardWriter",)

    def command(self, home: Path) -> list[str]:
        return ["anchors", "build", self.written(home, {"craft.anchor_cache_dir": str(home / "anchors")})]

    def progress(self, home: Path) -> int:
        return len(list((home / "anchors" / "shards").glob("*.parquet")))

    def result(self, home: Path) -> Any:
        shards = sorted((home / "anchors" / "shards").iterdir())
        ids = [pq.read_table(shard, columns=["id"])["id"].to_pylist() for shard in shards]
        return read_manifest(home / "anchors").content, ids


class Training(Stage):
    """`craft-ray train` with two workers."""

    name = "training"
    titles = ("RayTrainWorker",)

    def run(self, home: Path) -> RunFolder:
        return RunFolder(home / f"{self.config.name}-{self.config.arm}-seed{self.config.seed}")

    def command(self, home: Path) -> list[str]:
        if self.run(home).started:
            return ["train", "--resume", str(self.run(home).path)]
        return ["train", self.written(home, {"output_dir": str(home)})]

    def progress(self, home: Path) -> int:
        return len(self.run(home).read_metrics())

    def weights(self, home: Path) -> Path:
        return self.run(home).path / "checkpoints" / "last" / "model" / "model.safetensors"

    def result(self, home: Path) -> Any:
        return checksum(self.weights(home)), [untimed(record) for record in self.run(home).read_metrics()]


class Sweep(Stage):
    """`craft-ray sweep` over trials of one worker."""

    name = "sweep"
    titles = ("CraftTrial", "ResourceTrainable")

    def command(self, home: Path) -> list[str]:
        if SweepFolder(home / "sweep").plan.exists():
            return ["sweep", "--resume", str(home / "sweep")]
        config = self.written(home, {"output_dir": str(home)})
        (home / "space.yaml").write_text("train.learning_rate: {loguniform: [5.0e-4, 4.0e-3]}\n")
        return ["sweep", config, "--space", str(home / "space.yaml"), "--out", str(home / "sweep")]

    def progress(self, home: Path) -> int:
        return sum(len(trial.reports()) for trial in SweepFolder(home / "sweep").trials())

    def result(self, home: Path) -> Any:
        rows = pq.read_table(home / "sweep" / "trials.parquet", columns=["trial", "rank", "status"]).to_pylist()
        trials = [
            (trial.params(), [untimed(r) | {"metrics": untimed(r["metrics"])} for r in trial.reports()])
            for trial in SweepFolder(home / "sweep").trials()
        ]
        return rows, trials


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its times."""
    return {key: value for key, value in record.items() if key != "seconds" and not key.startswith("perf/")}


def stages(world: Path) -> list[Stage]:
    """The three stages on a tiny model that answers questions on pictures of digits; its cache is `world/anchors`."""
    if not (world / "model").exists():
        digits.write_data(world / "data")
        digits.build_model(world / "model")
    columns = {"id": "id", "image": "image", "prompt": "prompt"}

    def data(name: str, **more: Any) -> dict[str, Any]:
        path = str(world / "data" / f"{name}.parquet")
        return {"path": path, "columns": columns | ({} if name == "anchors" else {"response": "response"}), **more}

    tree = {
        "name": "chaos",
        "model": {"kind": "vision_language", "path": str(world / "model")},
        "task": data("new_train"),
        "anchors": {
            "source": data("anchors", limit=160), "positions": ["text_last"], "rows_per_shard": 4, "max_new_tokens": 2,
            "actors": 2,
        },
        "craft": {
            "anchor_cache_dir": str(world / "anchors"), "anchor_batch_size": 8, "epsilon_start": 0.001,
            "conflict_threshold": 0.5,
        },
        "train": {"steps": 40, "batch_size": 8, "learning_rate": 2e-3, "checkpoint_every": 5},
        "workers": {"num_workers": 2},
    }  # fmt: skip
    config = parse_config(tree, "chaos")
    looked = {
        "train.steps": 10, "train.checkpoint_every": 2, "workers.num_workers": 1, "validation.every": 2,
        "objective": {"minimize": "train/loss"}, "sweep": {"samples": 4, "scheduler": "none"},
    }  # fmt: skip
    return [Cache(config), Training(config), Sweep(config.changed(looked))]


@dataclass(frozen=True)
class Undisturbed:
    """The result of a stage without kills, and how long it takes."""

    home: Path
    result: Any
    seconds: float
    startup_s: float
    """Seconds until the first shard, step or validation."""
    progress: int


def undisturbed(stage: Stage, home: Path, cluster: Cluster) -> Undisturbed:
    started = time.monotonic()
    driver = stage.start(home, cluster)
    while not stage.progress(home) and driver.poll() is None:
        time.sleep(0.02)
    startup_s = time.monotonic() - started
    finish(driver)
    return Undisturbed(home, stage.result(home), time.monotonic() - started, startup_s, stage.progress(home))


def finish(driver: subprocess.Popen[str]) -> str:
    """The output of a driver, which must end by itself and succeed."""
    try:
        out, _ = driver.communicate(timeout=TIMEOUT_S)
    except BaseException:
        driver.kill()
        raise
    if driver.returncode not in (0, NOT_MET):
        raise RuntimeError(f"exit code {driver.returncode}: {out[-4000:]}")
    return out


@dataclass(frozen=True)
class Kill:
    """One kill and its outcome."""

    stage: str
    kind: str
    at: float
    """Seconds after the start."""
    reached: int
    of: int
    seconds: float
    """Seconds from the kill to the end of the stage."""
    undisturbed: float
    """Seconds of the stage without a kill."""
    same: bool
    said: str
    """The output of the driver that finished the stage."""

    @property
    def times(self) -> float:
        """The time of the whole stage over that of the undisturbed one."""
        return (self.at + self.seconds) / self.undisturbed

    def line(self, number: int) -> str:
        end = "same result" if self.same else "OTHER RESULT"
        where = f"{self.reached} of {self.of}"
        return (
            f"{number:>2}  {self.stage:<8}  {self.kind:<6}  killed after {self.at:5.1f} s at {where:<9}  "
            f"{end} {self.seconds:5.1f} s later, in {self.times:.2f} of the undisturbed time"
        )


def disturb(
    stage: Stage, kind: str, home: Path, cluster: Cluster, reference: Undisturbed, moment: Callable[[], bool],
    rng: random.Random,
) -> Kill | None:  # fmt: skip
    """Run a stage and kill a part of it when `moment` returns true. None if the stage ended before that."""
    started = time.monotonic()
    driver = stage.start(home, cluster)
    victims: list[psutil.Process] = []
    while not moment() or (kind == "worker" and not (victims := [*itertools.chain(*stage.workers(cluster))])):
        if driver.poll() is not None:
            finish(driver)
            return None
        time.sleep(0.02)
    at, reached = time.monotonic() - started, stage.progress(home)
    if kind == "worker":
        rng.choice(victims).kill()
    elif kind == "node":
        cluster.lose(rng.choice(cluster.nodes))
        cluster.add()
    else:
        driver.kill()
        driver.communicate()
        driver = stage.start(home, cluster)
    try:
        said = finish(driver)
        same = stage.result(home) == reference.result
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        said, same = str(error), False
    seconds = time.monotonic() - started - at
    return Kill(stage.name, kind, at, reached, reference.progress, seconds, reference.seconds, same, said)


def chaos(
    planned: Sequence[tuple[Stage, str]], references: dict[str, Undisturbed], cluster: Cluster, home: Path, seed: int,
    say: Callable[[str], None],
) -> list[Kill]:  # fmt: skip
    """Run the planned kills in turn, with a log line for each."""
    rng, kills = random.Random(seed), []
    for number, (stage, kind) in enumerate(planned, 1):
        kill = None
        while kill is None:
            shutil.rmtree(home / "run", ignore_errors=True)
            moment = drawn(stage, home / "run", references[stage.name], rng)
            kill = disturb(stage, kind, home / "run", cluster, references[stage.name], moment, rng)
        kills.append(kill)
        say(kill.line(number))
        if not kill.same:  # kept as evidence
            shutil.copytree(home / "run", Path(tempfile.mkdtemp(prefix=f"craft-ray-kill-{number}-")) / "run")
            print(kill.said, file=sys.stderr, flush=True)
    return kills


def drawn(stage: Stage, home: Path, reference: Undisturbed, rng: random.Random) -> Callable[[], bool]:
    """Whether a random moment has come: before the first shard, step or validation, or between two of them."""
    before = rng.random() < BEFORE_WORK
    reached = 0 if before else rng.randrange(1, reference.progress)
    work = reference.seconds - reference.startup_s
    pause = rng.uniform(0, reference.startup_s if before else work / reference.progress)
    since: list[float] = []

    def come() -> bool:
        if not since and stage.progress(home) >= reached:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= pause

    return come


def plan(every: Sequence[Stage], kills: int, seed: int) -> list[tuple[Stage, str]]:
    """Pairs of stage and kind, each equally often, in a random order."""
    pairs = list(itertools.islice(itertools.cycle(itertools.product(every, KINDS)), kills))
    random.Random(seed).shuffle(pairs)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("cache", "training", "sweep"), help="only this stage")
    parser.add_argument("--kind", choices=KINDS, help="only kills of this kind")
    parser.add_argument("--log", type=Path, default=LOG)
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        options.log.write_text("\n".join(lines) + "\n")

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="craft-ray-chaos-") as folder, Cluster() as cluster:
        world = Path(folder)
        cluster.env["CRAFT_RAY_CACHE"] = str(world / "expanded")
        every = stages(world)
        shared = Cache(every[0].config)
        finish(shared.start(world, cluster))
        chosen = [stage for stage in every if options.stage in (None, stage.name)]
        references = {stage.name: undisturbed(stage, world / stage.name, cluster) for stage in chosen}
        say(f"# python -m benchmarks.chaos --kills {options.kills} --seed {options.seed}, {machine()}")
        took = (f"{name} {it.seconds:.0f} s, {it.startup_s:.0f} s of them start-up" for name, it in references.items())
        say(f"# undisturbed: {'; '.join(took)}")
        planned = plan(chosen, options.kills, options.seed)
        if options.kind:
            planned = [(stage, options.kind) for stage, _ in planned]
        kills = chaos(planned, references, cluster, world, options.seed, say)
    for kind in KINDS:
        if times := sorted(kill.times for kill in kills if kill.kind == kind):
            spread = f"[{times[0]:.2f}, {times[-1]:.2f}]"
            say(f"# lost {kind}: {statistics.median(times):.2f} {spread} of the undisturbed time, {len(times)} kills")
    right = sum(kill.same for kill in kills)
    say(f"# {len(kills)} kills, {right} correct results, {(time.monotonic() - started) / 60:.0f} minutes")
    sys.exit(right < len(kills))


def machine() -> str:
    import ray

    cores = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"
    return f"{cores}, Python {platform.python_version()}, Ray {ray.__version__}"


if __name__ == "__main__":
    main()
