"""What Tune reports about the trials: recorded on disk, and printed in a line each."""

from __future__ import annotations

import pickle
import shlex
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from craft_pipelines.failures import node_was_lost
from craft_pipelines.sweep.following import RunningTrials
from craft_pipelines.sweep.tracking import SweepTracking
from craft_ray.pace import Pace
from craft_ray.pace import Report as ProgressReport
from craft_ray.sweep.results import SweepResult
from craft_ray.sweep.trials import Plan, Report, SweepFolder, TrialFolder
from craft_ray.sweep.wording import shown

Say = Callable[[str], None]


class TrialLog(Callback):
    """Records how trials end, and prints it. A trial that ended before an interruption is skipped silently."""

    def __init__(
        self,
        folder: SweepFolder,
        plan: Plan,
        count: int,
        tracking: SweepTracking,
        say: Say,
        running: RunningTrials,
        report: ProgressReport,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._tracking = tracking
        self._count = count
        self._say = say
        self._running = running
        self._crashes: Counter[int] = Counter()
        self._ended = {trial.number for trial in folder.trials() if trial.outcome().status != "open"}
        self._started = False
        self._part: dict[int, float] = {}
        """For each running trial, the part of its steps that is done."""
        self._lock = threading.Lock()
        self._pace = Pace("trials", count, report, len(self._ended))

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves its callbacks for a restoring of its own, which no sweep uses, and neither locks nor the
        bars of a terminal can be saved."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if not self._started:
            self._started = True
            self._say("the first trial has started")
        ours = self._folder.trial_of(trial.trial_id)
        if ours.number not in self._ended:
            self._running.add(ours, self._reached_part)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        ours = self._folder.trial_of(trial.trial_id)
        self._tracking.sync(ours)
        steps = result["params"].get("train.steps", self._plan.config.train.steps) * self._plan.config.sweep.repeat
        self._reached_part(ours.number, result["step"] / steps)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        ours = self._folder.trial_of(trial.trial_id)
        ours.end("stopped")  # unless the trial itself has recorded that it is finished
        self._announce(ours)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Tune tries a trial once more than it may crash, so that it can be lost with its node at any time. A trial
        that has crashed too often finds that it has ended, and fails for good."""
        ours = self._folder.trial_of(trial.trial_id)
        if lost_with_its_node(ours, trial):
            trial.max_failures += 1
        else:
            self._crashes[ours.number] += 1
        if self._crashes[ours.number] > self._plan.config.sweep.max_failures:
            ours.end("failed", reason(ours, trial))
        else:
            self._say(f"trial {ours.number}: {reason(ours, trial)}; it is tried again")
        ours.write_error(None)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        ours = self._folder.trial_of(trial.trial_id)
        ours.end("failed", reason(ours, trial))
        self._announce(ours)

    def _announce(self, trial: TrialFolder) -> None:
        if trial.number in self._ended:
            return
        self._running.remove(trial)
        with self._lock:
            self._ended.add(trial.number)
        self._tracking.sync(trial)
        self._say(f"[{len(self._ended)}/{self._count}] {trial_line(self._plan, trial)}")
        self._reached()

    def _reached_part(self, number: int, part: float) -> None:
        with self._lock:  # a trial that is followed reports its steps from another thread
            self._part[number] = part
        self._reached()

    def _reached(self) -> None:
        with self._lock:
            running = (part for number, part in self._part.items() if number not in self._ended)
            self._pace.reached(len(self._ended) + sum(running))


def trial_line(plan: Plan, trial: TrialFolder) -> str:
    """A trial that has ended: how, its numbers, and its setting."""
    outcome, params, found = trial.outcome(), trial.params() or {}, trial.reports()
    knobs = " ".join(f"{key.removeprefix('craft.')}={shown(value)}" for key, value in params.items())
    if outcome.status == "failed":
        return f"trial {trial.number} failed: {outcome.reason} | {knobs}"
    last = found[-1]
    how = "finished" if outcome.status == "finished" else f"stopped at step {last['step']}"
    return f"trial {trial.number} {how} after {last['seconds']:.0f} s: {numbers_in(plan, last)} | {knobs}"


def conclusion(result: SweepResult, folder: SweepFolder) -> list[str]:
    """The result of a sweep, in words."""
    best = result.best
    assert best is not None, "a sweep without a finished trial is an error"
    assert best.last is not None
    count = Counter(trial.outcome.status for trial in result.trials)
    feasible = sum(trial.feasible is True for trial in result.ranking)
    lines = [f"{count['finished']} trials finished, {count['stopped']} stopped early, {count['failed']} failed"]
    objective = result.plan.config.objective
    if objective is not None and objective.subject_to:
        lines[0] += f"; {feasible} of the finished are within the bounds"
    where = f"{numbers_in(result.plan, best.last)} on validation data"
    if best.feasible:
        lines.append(f"best: trial {best.number}, {where}")
    else:
        lines.append(f"NO trial is within the bounds; the least violating is trial {best.number}: {where}")
        if count["stopped"]:
            lines.append(
                f"{count['stopped']} were stopped early and might have recovered, because retention often dips before "
                f"λ has risen: search further with sweep.grace={2 * result.plan.config.sweep.grace} or "
                f"sweep.scheduler=none"
            )
    lines += [f"  {key}={shown(value)}" for key, value in best.params.items()]
    caution = "" if best.feasible else " (it breaks a bound)"
    lines.append(f"train it{caution}: craft-ray train {shlex.quote(str(folder.path / 'best.yaml'))}")
    lines.append(f"report: {folder.path / 'report.html'}")
    return lines


def numbers_in(plan: Plan, report: Report) -> str:
    """The numbers of a report that the objective is about."""
    objective = plan.config.objective
    assert objective is not None
    parts = [f"{objective.metric} {report['value']:.4g}"]
    for metric, bound in objective.subject_to.items():
        part = f"{metric} {report['metrics'][metric]:.4g}"
        notes = [f"not {bound}"] if report["violations"][metric] else []
        if report["seeds"] > 1:
            notes.insert(0, f"{report['reached'][metric]:.4g} at {objective.confidence:.0%} confidence")
        parts.append(f"{part} ({', '.join(notes)})" if notes else part)
    return ", ".join(parts)


def lost_with_its_node(ours: TrialFolder, trial: Trial) -> bool:
    """Whether the last attempt ended because a node was lost."""
    if ours.read_error() is not None or trial.pickled_error_file is None:
        return False
    return node_was_lost(pickle.loads(Path(trial.pickled_error_file).read_bytes()))  # which this process wrote


def reason(ours: TrialFolder, trial: Trial) -> str:
    """Why an attempt failed, in one line: the error that it recorded, else what Ray saw of its process."""
    recorded = ours.read_error()
    if recorded is not None:
        return recorded
    seen = Path(trial.error_file).read_text().split() if trial.error_file else []
    return f"its process was lost ({' '.join(seen)[-300:]})"
