"""A sweep in MLflow and Weights & Biases: one run for the sweep, one below it for each trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from craft_ray.errors import CraftError
from craft_ray.run.metrics import Record
from craft_ray.storage.files import write_atomically
from craft_ray.sweep.trials import Plan, Report, SweepFolder, TrialFolder
from craft_ray.tracking import Status, TrackedRun, Tracker, open_trackers

SWEEP = "sweep"


class SweepTracking:
    """Brings the trackers up to date with the trials' folders.

    A tracker that stops working loses its numbers, but does not end the sweep.
    """

    def __init__(self, folder: SweepFolder, plan: Plan, say: Callable[[str], None]) -> None:
        """
        Raises:
            ConfigError: a package is missing, or a server does not answer.
        """
        self._say = say
        self._trackers = [
            _TrackedSweep(tracker, folder, plan) for tracker in open_trackers(plan.config.tracking, folder.path)
        ]

    def sync(self, trial: TrialFolder) -> None:
        """Log the new reports of a trial, and its end."""
        self._each(lambda tracked: tracked.sync(trial))

    def end(self, status: Status, best: TrialFolder | None = None) -> None:
        """End the sweep's own run, with the best trial's last report as its numbers."""
        self._each(lambda tracked: tracked.end(status, best))

    def _each(self, act: Callable[[_TrackedSweep], None]) -> None:
        for tracked in list(self._trackers):
            try:
                act(tracked)
            except CraftError as error:
                self._trackers.remove(tracked)
                self._say(f"{error.message}; the sweep continues without it, and its folder has all numbers")


class _TrackedSweep:
    """A sweep in one tracker. `tracking-NAME.json` records the runs that belong to it and the progress of each, so
    that a resumed sweep continues them."""

    def __init__(self, tracker: Tracker, folder: SweepFolder, plan: Plan) -> None:
        self._tracker = tracker
        self._plan = plan
        self._path = folder.path / f"tracking-{tracker.name}.json"
        self._known: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._open: dict[str, TrackedRun] = {}

    def sync(self, trial: TrialFolder) -> None:
        key, status = str(trial.number), trial.outcome().status
        if key in self._known and self._known[key]["ended"]:
            return
        run = self._run(key, f"{self._plan.config.name}-trial{key}", trial.params() or {}, self._sweep())
        new = [report for report in trial.reports() if report["step"] > self._known[key]["step"]]
        run.log([_record(report) for report in new])
        if status != "open":
            run.end(status)
        self._known[key] |= {"step": new[-1]["step"] if new else self._known[key]["step"], "ended": status != "open"}
        self._write()

    def end(self, status: Status, best: TrialFolder | None) -> None:
        if SWEEP in self._known and self._known[SWEEP]["ended"]:
            return  # nothing was added to a sweep that had ended
        run = self._sweep()
        run.log([_record(report) for report in (best.reports() if best else [])[-1:]])
        run.end(status)
        self._known[SWEEP]["ended"] = status == "finished"
        self._write()

    def _sweep(self) -> TrackedRun:
        return self._run(SWEEP, f"{self._plan.config.name}-sweep", self._plan.config.model_dump(mode="json"), None)

    def _run(self, key: str, name: str, params: dict[str, Any], parent: TrackedRun | None) -> TrackedRun:
        """A run that is open, or one to resume, or a new one."""
        if key not in self._open:
            entry = self._known.setdefault(key, {"id": None, "step": 0, "ended": False})
            run = self._open[key] = self._tracker.start(name, params, parent, entry["id"])
            if key != SWEEP and entry["id"] is not None:  # a killed driver may have logged more than it recorded
                entry["step"] = max(entry["step"], run.reached())
            entry |= {"id": run.id, "ended": False}
            self._write()
        return self._open[key]

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(self._known))


def _record(report: Report) -> Record:
    """A report as the numbers of a step."""
    verdict = {"sweep/score": report["score"], "sweep/feasible": report["feasible"]}
    return {"step": report["step"], **report["metrics"], **verdict}
