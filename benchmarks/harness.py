"""How everything here is measured: interleaved rounds, ratios of times of the same round, medians with quartiles.

A time alone depends on the machine and its load. The ratio of two times measured within the same second does not, or
much less; so every claim is the median of such ratios. The clock is the processor time of this process unless stated
otherwise, because other processes disturb it least.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "ray", "pyarrow", "torchjd", "numpy")


@dataclass(frozen=True)
class Clock:
    """A clock, and what it measures."""

    name: str
    read: Callable[[], float]


def _read_cuda() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


CPU_TIME = Clock("processor time of the process", time.process_time)
WALL = Clock("wall clock", time.perf_counter)
CUDA = Clock("wall clock, device synchronized", _read_cuda)


@dataclass(frozen=True)
class Variant:
    """One of the things compared."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None
    """Prepares what `run` needs; not timed."""


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratios of all rounds."""

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        ordered = sorted(ratios)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(last / 4)], ordered[round(last * 3 / 4)], len(ordered))


@dataclass(frozen=True)
class Timings:
    """Seconds of every variant in every round."""

    seconds: dict[str, list[float]]
    clock: str

    def ratio(self, over: str | Sequence[str], under: str | Sequence[str]) -> Ratio:
        """The time of one variant over that of another, round by round; several names are added up."""
        return Ratio.of([a / b for a, b in zip(self._sum(over), self._sum(under), strict=True)])

    def _sum(self, names: str | Sequence[str]) -> list[float]:
        chosen = [self.seconds[name] for name in ([names] if isinstance(names, str) else names)]
        return [sum(times) for times in zip(*chosen, strict=True)]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def interleaved(
    variants: Mapping[str, Variant], rounds: int, clock: Clock = CPU_TIME, budget_s: float = 600.0
) -> Timings:
    """Run every variant once in every round, each round starting with another one.

    Args:
        budget_s: no round starts after this time, but there are at least three.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for variant in variants.values():  # warm caches, allocators and kernels
        _timed(variant, clock)
    end = time.monotonic() + budget_s
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(_timed(variants[name], clock))
            if round_ >= 2 and time.monotonic() > end:
                break
    finally:
        gc.enable()
    return Timings(seconds, clock.name)


def _timed(variant: Variant, clock: Clock) -> float:
    if variant.prepare is not None:
        variant.prepare()
    start = clock.read()
    variant.run()
    return clock.read() - start


@dataclass
class Row:
    """One line of a report."""

    what: str
    value: float | None
    """None if it could not be measured; `note` says why."""
    unit: str = "ratio"
    lower: float | None = None
    upper: float | None = None
    rounds: int | None = None
    target: str | None = None
    """For example `>= 2` or `<= 1.05`."""
    note: str = ""

    @classmethod
    def of(cls, what: str, ratio: Ratio, target: str | None = None, note: str = "") -> Row:
        return cls(what, ratio.median, "ratio", ratio.lower, ratio.upper, ratio.rounds, target, note)

    @property
    def met(self) -> bool | None:
        if self.target is None or self.value is None:
            return None
        sign, bound = self.target.split()
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)

    def line(self) -> str:
        spread = "" if self.lower is None else f"[{self.lower:.3f}, {self.upper:.3f}] n={self.rounds}"
        verdict = {None: "", True: f"target {self.target}: met", False: f"target {self.target}: MISSED"}[self.met]
        value = "-" if self.value is None else f"{self.value:.4g}"
        parts = [f"{self.what:74s} {value:>9s} {self.unit:8s} {spread:24s}", verdict, self.note]
        return "  ".join(parts).rstrip()


@dataclass
class Report:
    """The measurements of one command."""

    benchmark: str
    clock: str
    judge: bool = True
    """Whether to compare with targets; off for tiny sizes, to which targets do not apply."""
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        row.target = row.target if self.judge else None
        self.rows.append(row)
        print(row.line(), flush=True)

    def dump(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "command": command(),
            "commit": commit(),
            "clock": self.clock,
            "hardware": hardware(),
            "rows": [asdict(row) | {"met": row.met} for row in self.rows],
        }

    def finish(self, path: str | None) -> None:
        """Print the report as JSON, or write it to a file."""
        text = json.dumps(self.dump(), indent=1)
        if path is None:
            print(text)
        else:
            Path(path).write_text(text + "\n")


def arguments(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to test the script")
    parser.add_argument("--json", help="file for the report; without it, the report is printed")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    return parser


def one_thread(threads: int = 1) -> None:
    """Compute on `threads` threads; one is the default of each worker of the product."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def command() -> str:
    spec = sys.modules["__main__"].__spec__
    program = f"-m {spec.name}" if spec is not None else os.path.relpath(sys.argv[0])
    return " ".join(["python", program, *sys.argv[1:]])


def commit() -> str:
    """The commit of this tree, with `-dirty` if files were changed since."""
    call = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(
            call, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hardware() -> dict[str, Any]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
