"""A trial: one setting on its seeds, validation by validation, as Ray Tune's trainable."""

from __future__ import annotations

import gc
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from ray import tune

from craft_pipelines.sweep.runs import RunTrial
from craft_ray.config import Experiment
from craft_ray.errors import CraftError
from craft_ray.quiet import quiet_libraries
from craft_ray.run.checkpoint import adopt_checkpoint, checkpoint_step
from craft_ray.run.folder import RunFolder
from craft_ray.run.identity import forget_identity
from craft_ray.run.metrics import Record
from craft_ray.run.objective import Verdict, judge, means, objective_of
from craft_ray.storage.last import last_checkpoint
from craft_ray.storage.paths import copy_tree, remove_tree, storage_path
from craft_ray.sweep.space import Params
from craft_ray.sweep.trials import Plan, Report, SweepFolder, TrialFolder, seeds, trial_config

TRIAL = "trial"
"""The key of Tune's config that holds a trial's number."""


class CraftTrial(tune.Trainable):
    """Reports at each validation. The process is reused for the next trial, because starting one is the expensive part.

    The setting of a trial is in its folder. Tune's config has the trial's number, and what population based training
    has changed.
    """

    _reports: Generator[Report]

    def setup(self, config: dict[str, Any], sweep: str, run_trial: RunTrial) -> None:  # type: ignore[override]  # with_parameters
        quiet_libraries()
        self._sweep = SweepFolder(storage_path(sweep))
        self._plan = self._sweep.load()
        self._run_trial = run_trial
        self._begin(config)

    def step(self) -> Report:
        self._trial.write_error(None)
        try:
            return next(self._reports)
        except Exception as error:
            reason = error.message if isinstance(error, CraftError) else f"{type(error).__name__}: {error}"
            self._trial.write_error(" ".join(reason.split()))
            raise

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        gc.collect()  # the next trial needs the memory
        gc.freeze()  # what is left are modules and the like, which the next collection need not visit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._reports.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The run's last checkpoint, which was written just before the validation."""
        last = last_checkpoint(self._run.checkpoints)
        assert last is not None, "pbt saves at each validation"
        copy_tree(last, Path(checkpoint_dir) / last.name)

    def load_checkpoint(self, checkpoint: str) -> None:  # type: ignore[override]  # what a folder was saved to
        """Another trial's checkpoint, or this trial's after a pause, becomes the one from which the run resumes."""
        (source,) = Path(checkpoint).glob("step_*")
        self._reports.close()
        self._trial.drop_reports_after(checkpoint_step(source))
        forget_identity(self._run)  # it continues as the other trial did, and with its own setting
        adopt_checkpoint(self._run.checkpoints, source)
        self._reports = self._stream(after=checkpoint_step(source))

    def _begin(self, config: dict[str, Any]) -> None:
        self._trial = self._sweep.trial_of(self.trial_id)
        self._trial.write_error(None)
        after = 0
        if self._plan.config.sweep.scheduler == "pbt":
            if changed := {key: value for key, value in config.items() if key != TRIAL}:
                forget_identity(self._run)
                self._trial.begin(changed)  # to a better trial's setting, or one near it
            # It resumes from its checkpoint, so it does not repeat its reports, except for the last: it may have been
            # lost before it recorded its end.
            steps = self._plan.config.train.steps
            after = max((report["step"] for report in self._trial.reports() if report["step"] < steps), default=0)
        self._reports = self._stream(after)

    def _stream(self, after: int) -> Generator[Report]:
        return reports(self._trial, self._plan, self._run_trial, after)

    @property
    def _run(self) -> RunFolder:
        params = self._trial.params()
        assert params is not None
        return self._trial.run(seeds(self._plan.config, params)[0])


def reports(trial: TrialFolder, plan: Plan, run_trial: RunTrial, after: int = 0) -> Generator[Report]:
    """The reports of a trial, the last with `done`. The reports of a trial that has ended, and those from before an
    interruption, are read from its folder: nothing is computed twice.

    The first seed reports at each validation. A setting that is not stopped is then run on its other seeds, which
    report only at their ends: the numbers are then means over the seeds that are done.

    Args:
        run_trial: what runs the config of each seed.
        after: reports up to this step are skipped.
    """
    known = {report["step"]: report | {"done": False} for report in trial.reports() if report["step"] > after}
    outcome = trial.outcome()
    if outcome.status == "failed":
        raise CraftError(outcome.reason or "it has failed")
    if outcome.status != "open":
        yield from [*known.values()][:-1]
        yield [*known.values()][-1] | {"done": True}
        return
    params = trial.params()
    assert params is not None, "a trial has a setting before it is run"
    objective, reported, complete = objective_of(plan.config), after, 0
    spent = max((report["seconds"] for report in trial.reports() if report["step"] <= after), default=0.0)
    started = time.perf_counter()
    ended: list[Record] = []
    todo = seeds(plan.config, params)
    for seed in todo:
        config = trial_config(plan.config, params, trial, seed)
        with closing(_validations(config, trial.run(seed), run_trial, plan.command)) as validations:
            for metrics in validations:
                last = metrics["step"] == config.train.steps
                runs = [*ended, metrics]
                if last:
                    ended.append(metrics)
                    if plan.config.sweep.scheduler != "pbt":
                        # A setting can be trained again, unless it changed during training.
                        remove_tree(trial.run(seed).checkpoints)
                elif seed != todo[0]:
                    continue
                step = complete + metrics["step"]
                if step <= reported:
                    continue
                for before in (report for at, report in known.items() if reported < at < step):
                    spent = before["seconds"]  # the run resumes from a checkpoint
                    yield before
                reported = step
                if step in known:
                    report = known[step]
                else:
                    seconds = spent + time.perf_counter() - started
                    report = _report(step, params, runs, judge(objective, runs), seconds)
                    trial.add_report(report)
                done = last and seed == todo[-1]
                if done:
                    trial.end("finished")
                yield report | {"done": done}
        complete += config.train.steps


def _report(step: int, params: Params, runs: Sequence[Record], verdict: Verdict, seconds: float) -> Report:
    return {
        "step": step,
        "seeds": len(runs),
        "params": params,
        "metrics": _mean(runs),
        "value": verdict.value,
        "reached": verdict.reached,
        "violations": verdict.violations,
        "feasible": verdict.feasible,
        "score": verdict.score,
        "seconds": seconds,
    }


def _validations(config: Experiment, folder: RunFolder, run_trial: RunTrial, command: list[str]) -> Generator[Record]:
    """The numbers at each validation: its scores, and the means of the steps since the previous one. The last one comes
    when the run is concluded, so that a trial that has reported it has nothing left to lose."""
    if folder.finished() is None:
        folder.begin(config, command)
    last: Record | None = None
    checkpoint = last_checkpoint(folder.checkpoints)
    if checkpoint is not None:  # the process may have been lost between an earlier validation and its report
        for record in folder.read_validation():
            if record["step"] <= min(checkpoint_step(checkpoint), config.train.steps - 1):
                yield _with_means(folder, record)
    with closing(run_trial(config, folder)) as stream:
        for record in stream:
            last = record
            if record["step"] < config.train.steps:
                yield _with_means(folder, record)
    # A run that was lost between its last validation and its end has no validation left to do.
    yield _with_means(folder, last or folder.read_validation()[-1])


def _with_means(folder: RunFolder, validation: Record) -> Record:
    """A validation record with the means of the steps since the previous one, whichever process wrote that."""
    at = validation["step"]
    before = max((record["step"] for record in folder.read_validation() if record["step"] < at), default=0)
    return means(record for record in folder.read_metrics() if before < record["step"] <= at) | validation


def _mean(runs: Sequence[Record]) -> Record:
    """Means over runs, of the numbers that each of them has."""
    shared = [key for key in runs[0] if key != "step" and all(run.get(key) is not None for run in runs)]
    return {key: sum(run[key] for run in runs) / len(runs) for key in shared}
