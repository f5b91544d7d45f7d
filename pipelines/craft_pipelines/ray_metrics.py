"""The numbers of a stage as Ray metrics. The node where it runs exports them to Prometheus, with the prefix `ray_`.

Ray exports a gauge once each time it is set, and forgets it after twenty seconds. So the last values of a stage are set
again every few seconds while it runs; the metrics of a run that has ended, or whose process is lost, disappear by
themselves. Without Ray, nothing happens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.metrics import Counter, Gauge

from craft_ray.config import scores_of
from craft_ray.run.metrics import Record, retention_step, skills_in
from craft_ray.run.observers import Observer
from craft_ray.storage.paths import StoragePath

REFRESH_S = 4.0
"""Ray exports every ten seconds. A value that one export misses would be absent until the next."""

RUN, VALIDATION, CACHE = ("run", "arm"), ("run", "arm", "skill"), ("cache",)

GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "craft_step": ("Steps done", RUN),
    "craft_steps_planned": ("Steps of the whole run", RUN),
    "craft_task_loss": ("Loss of the new skill", RUN),
    "craft_grad_norm": ("Norm of the merged gradient, before clipping", RUN),
    "craft_learning_rate": ("Learning rate", RUN),
    "craft_retention_loss": ("Retention loss L_ret of the last step that measured it", RUN),
    "craft_epsilon": ("Retention budget", RUN),
    "craft_lambda": ("Multiplier", RUN),
    "craft_skill_retention_loss": ("Of several old skills, the retention loss of one", VALIDATION),
    "craft_skill_epsilon": ("Of several old skills, the budget of one", VALIDATION),
    "craft_skill_lambda": ("Of several old skills, the multiplier of one: the price of keeping it", VALIDATION),
    "craft_violation": ("max(0, L_ret / epsilon - 1) of the last step that measured L_ret", RUN),
    "craft_conflict_rate": ("Part of the steps since the last log whose two gradients conflicted", RUN),
    "craft_step_seconds": ("Mean seconds of a step since the last log", RUN),
    "craft_data_seconds": ("Mean seconds that a step waited for its data since the last log", RUN),
    "craft_validation_score": ("Score on validation data", VALIDATION),
    "craft_validation_ratio": ("Score on validation data, relative to the teacher's", VALIDATION),
    "craft_heldout_retention_loss": ("Retention loss on held-out anchors", VALIDATION),
    "craft_heldout_violation": ("max(0, L_ret / final epsilon - 1) on held-out anchors", VALIDATION),
    "craft_anchors_done": ("Anchors in complete shards", CACHE),
    "craft_anchors_planned": ("Anchors of the whole cache", CACHE),
    "craft_anchors_per_second": ("Anchors per second of all teachers, since the build started", CACHE),
}
"""What each gauge means, and its tags."""

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "craft_steps": ("Steps done by all runs of an arm", ("arm",)),
    "craft_anchors": ("Anchors that teachers have run on", CACHE),
}
"""Exported with `_total` after their names. A counter exists as long as its node, so it has no tag for a run."""

LATEST = {
    "craft_task_loss": "train/loss",
    "craft_grad_norm": "train/grad_norm",
    "craft_learning_rate": "train/lr",
    "craft_epsilon": "craft/epsilon",
    "craft_lambda": "craft/lambda",
}


class RefreshedGauges:
    """Gauges with the same tags, exported from their first value until the end of a `with`, or of the process."""

    def __init__(self, enabled: bool = True, **tags: str) -> None:
        self._tags = tags
        self._values: dict[tuple[str, str | None], float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        if not enabled:
            self._closed.set()

    def set(self, values: Mapping[str, float | None], skill: str | None = None) -> None:
        """Set the gauges. None is skipped: the previous value stays."""
        with self._lock:
            new = {(name, skill): float(value) for name, value in values.items() if value is not None}
            self._values |= new
            if not self._on():
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._refresh, daemon=True)
                self._thread.start()
                new = self._values  # some may have been set before Ray was initialized
            self._send(new)

    def count(self, name: str, amount: float, *tags: str) -> None:
        """Add to a counter that has these of our tags."""
        if amount and self._on():
            _counter(name).inc(amount, {tag: self._tags[tag] for tag in tags})

    def _on(self) -> bool:
        return not self._closed.is_set() and ray.is_initialized()

    def _refresh(self) -> None:
        while not self._closed.wait(REFRESH_S):
            with self._lock:
                if self._on():
                    self._send(self._values)

    def _send(self, values: Mapping[tuple[str, str | None], float]) -> None:
        for (name, skill), value in values.items():
            _gauge(name).set(value, self._tags if skill is None else {**self._tags, "skill": skill})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()


class RayMetrics(RefreshedGauges):
    """Reports the state of a run to Ray, and passes everything on to another observer.

    Args:
        enabled: set in one process of a run.
    """

    def __init__(self, folder: StoragePath, arm: str, steps: int, inner: Observer, enabled: bool) -> None:
        super().__init__(enabled, run=run_tag(folder), arm=arm)
        self.inner = inner
        self.set({"craft_steps_planned": steps})

    def note(self, text: str) -> None:
        self.inner.note(text)

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        self.inner.progress(what, done, total, left_s)

    def steps(self, records: Sequence[Record]) -> None:
        if records:
            self.set(gauge_values(records))
            for skill, values in skill_values(records).items():
                self.set(values, skill)
            self.count("craft_steps", len(records), "arm")
        self.inner.steps(records)

    def validated(self, record: Record) -> None:
        named = {skill: scores_of(skill) for skill in skills_in(record)}
        for skill, prefix in {"old": "old", "new": "new", **named}.items():
            self.set({f"craft_validation_{what}": record.get(f"{prefix}/{what}") for what in ("score", "ratio")}, skill)
        for skill, prefix in {"old": "heldout", **named}.items():
            losses = {f"craft_heldout_{w}": record.get(f"{prefix}/{w}") for w in ("retention_loss", "violation")}
            self.set(losses, skill)
        self.inner.validated(record)

    def done(self, result: dict[str, Any]) -> None:
        self.inner.done(result)


class BuildMetrics(RefreshedGauges):
    """Reports the progress and the speed of a build to Ray.

    The driver of the build reports them, because a teacher's process stays until Ray Data has released its last object.
    """

    def __init__(self, cache_folder: StoragePath, planned: int, done: int) -> None:
        super().__init__(cache=cache_folder.name)
        self._done, self._started = done, time.perf_counter()
        self._before = self._ran = done
        self.set({"craft_anchors_planned": planned, "craft_anchors_done": done})

    def wrote(self, rows: int) -> None:
        self._done += rows
        self.set({"craft_anchors_done": self._done})

    def ran(self, rows: float) -> None:
        """Teachers have run on so many rows of the cache. They are fewer than before where the shard of a lost one is
        begun again: an anchor counts once."""
        whole = int(rows + 1e-6)  # parts of a row are added up in floating point
        if whole > self._ran:
            self.count("craft_anchors", whole - self._ran, "cache")
            self._ran = whole
            self.set({"craft_anchors_per_second": (whole - self._before) / (time.perf_counter() - self._started)})


def gauge_values(records: Sequence[Record]) -> dict[str, float | None]:
    """The values of the gauges after the steps since the last log."""
    last = records[-1]
    values: dict[str, float | None] = {"craft_step": last["step"]}
    values |= {gauge: last[key] for gauge, key in LATEST.items()}
    measured = [record for record in records if record["craft/retention_loss"] is not None]
    if measured:
        values["craft_retention_loss"] = measured[-1]["craft/retention_loss"]
        values["craft_violation"] = max(max(0.0, loss / epsilon - 1) for loss, epsilon in _held(measured[-1]))
        compared = [record["craft/conflict"] for record in measured if record["craft/conflict"] is not None]
        values["craft_conflict_rate"] = sum(compared) / len(compared) if compared else None
    for gauge, key in (("craft_step_seconds", "perf/step_s"), ("craft_data_seconds", "perf/data_s")):
        values[gauge] = sum(record[key] for record in records) / len(records)
    return values


def skill_values(records: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """The gauges of each of several old skills after the steps since the last log: the budget of the last step, the
    loss and the multiplier of the last retention step."""
    retention = retention_step(records)
    return {
        skill: {
            "craft_skill_epsilon": records[-1][f"{scores_of(skill)}/epsilon"],
            "craft_skill_retention_loss": None
            if retention is None
            else retention[f"{scores_of(skill)}/retention_loss"],
            "craft_skill_lambda": None if retention is None else retention[f"{scores_of(skill)}/lambda"],
        }
        for skill in skills_in(records[-1])
    }


def _held(record: Record) -> list[tuple[float, float]]:
    """L_ret and the budget of each constraint after a step."""
    prefixes = [scores_of(skill) for skill in skills_in(record)] or ["craft"]
    return [(record[f"{prefix}/retention_loss"], record[f"{prefix}/epsilon"]) for prefix in prefixes]


def run_tag(folder: StoragePath) -> str:
    """The name of a run's folder; for a run of a trial, `SWEEP/TRIAL/seedN`."""
    in_sweep = folder.parent.parent.name == "trials"
    return "/".join([folder.parents[2].name, folder.parent.name, folder.name]) if in_sweep else folder.name


@cache
def _gauge(name: str) -> Gauge:
    description, tags = GAUGES[name]
    return Gauge(name, description, tag_keys=tags)


@cache
def _counter(name: str) -> Counter:
    description, tags = COUNTERS[name]
    return Counter(name, description, tag_keys=tags)
