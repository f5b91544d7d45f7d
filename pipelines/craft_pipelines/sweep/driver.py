"""`craft-ray sweep`: trials on Ray Tune over one anchor cache, and their results."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, PlacementGroupFactory, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial

from craft_pipelines.anchors import build
from craft_pipelines.console import screen
from craft_pipelines.outputs import check_kept
from craft_pipelines.room import Room, room
from craft_pipelines.session import join
from craft_pipelines.storage_check import check_shared
from craft_pipelines.sweep.console import Say, TrialLog, conclusion
from craft_pipelines.sweep.following import RunningTrials
from craft_pipelines.sweep.runs import RunTrial, in_process, on_trainer
from craft_pipelines.sweep.schedulers import check_scheduler, scheduler_of
from craft_pipelines.sweep.search import PlannedSearch, begin_population, open_trials, sampler_of, trial_count
from craft_pipelines.sweep.tracking import SweepTracking
from craft_pipelines.sweep.trial import TRIAL, CraftTrial
from craft_pipelines.train import check_inputs, resources
from craft_ray.anchors.manifest import is_complete, read_manifest
from craft_ray.anchors.matching import select
from craft_ray.config import (
    DataConfig,
    EvalSet,
    Experiment,
    HarnessConfig,
    HarnessEvalSet,
    RolloutConfig,
    RolloutEvalSet,
    SampleEvalSet,
    differences,
)
from craft_ray.data.source import open_source
from craft_ray.data.task import open_task
from craft_ray.errors import ConfigError, CraftError, Interrupted
from craft_ray.run.folder import command_line
from craft_ray.run.held_out import eval_sets, key_of
from craft_ray.run.identity import check_same_data, task_name
from craft_ray.run.objective import objective_of
from craft_ray.run.scoring import open_eval_set
from craft_ray.storage.lock import exclusive_lock
from craft_ray.storage.paths import StoragePath, remove_tree, storage_path
from craft_ray.sweep.html import write_sweep_report
from craft_ray.sweep.results import read_results, write_results
from craft_ray.sweep.space import Space, check_space
from craft_ray.sweep.trials import Plan, SweepFolder

CHANGEABLE = ("tracking.", "sweep.parallel", "sweep.max_failures", "workers.max_failures")
"""Keys that change no number of a sweep."""

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run folder has its own log and events
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interruption ends the command, as in every other stage
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # what a resumed sweep needs is in the trials' folders
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one prints tables at verbose=0 too
}


def plan_sweep(config: Experiment, space: Space, path: StoragePath | None) -> tuple[SweepFolder, Plan]:
    """A new sweep, checked as far as it can be before a process starts.

    Raises:
        CraftError: the objective, the space, the scheduler or the data do not fit; or the folder holds a sweep.
    """
    plan = Plan(config, space, command_line())
    check_plan(plan)
    plan = replace(plan, data=_hashes(config))
    folder = SweepFolder(path or storage_path(config.output_dir) / f"{config.name}-sweep")
    check_kept(folder.path, "output_dir, or --out,")
    folder.begin(plan)
    return folder, plan


def resume_sweep(
    path: StoragePath,
    config: Experiment | None = None,
    space: Space | None = None,
    samples: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[SweepFolder, Plan]:
    """A sweep that has started, to resume its open trials; with `samples`, with another number of them.

    Args:
        changes: new values, by dotted key, for what changes no number: tracking.*, sweep.parallel and max_failures.

    Raises:
        ConfigError: there is none, it was started with another config or space, or trials that are open would train or
            be validated on other data than those that have ended.
    """
    folder = SweepFolder(path)
    plan = folder.load()
    planned = plan.config.sweep.samples
    if samples is not None and samples < planned:
        raise ConfigError(f"the sweep {path} was started with {planned} samples: --samples may only add to them")
    fixed = [key for key in changes or {} if not key.startswith(CHANGEABLE)]
    if fixed:
        raise ConfigError(
            f"a sweep is resumed with the {fixed[0]} that it was started with: only {', '.join(CHANGEABLE)} may change"
        )
    if config is not None:
        asked = config.changed({"sweep.samples": planned, **(changes or {})})
        difference = next(differences(plan.config.model_dump(), asked.model_dump()), None)
        if difference is not None:
            raise ConfigError(
                f"the sweep {path} was started with another config ({difference}): resume it with its own, --resume "
                f"{path} alone"
            )
    if space is not None and space.source != plan.space.source:
        raise ConfigError(
            f"the sweep {path} was started with the space {plan.space.name}, and {space.name} is another: resume it "
            f"with its own, --resume {path} alone"
        )
    plan = replace(plan, config=plan.config.changed({"sweep.samples": samples or planned, **(changes or {})}))
    check_plan(plan)
    if open_trials(folder, plan):
        hashes = _hashes(plan.config)
        for key, recorded in plan.data.items():
            remedy = "start a new sweep in another folder (--out)"
            check_same_data(key, recorded, hashes[key], f"the sweep {path}", remedy)
        plan = replace(plan, data=hashes)
    with sweep_lock(folder):
        folder.write(plan)
    return folder, plan


def sweep(folder: SweepFolder, plan: Plan, say: Say = print) -> bool:
    """Try the settings of a plan that have not ended, and write the results.

    Returns:
        Whether a finished trial is within all bounds.

    Raises:
        CraftError: the cache or the cluster does not allow it, or no trial finished.
    """
    config = plan.config
    with sweep_lock(folder), _resume_advice(folder):
        tracking = SweepTracking(folder, plan, say)
        for skill, eval_set in eval_sets(config, "validation"):
            if any(_inputs(eval_set) == _inputs(other) for _, other in eval_sets(config, "evaluation")):
                key = key_of(config, "validation", skill)
                say(f"{key} is also the evaluation data: a setting chosen on it will score too well on it")
        if open_trials(folder, plan):
            join(dashboard=config.workers.most > 1)
            room(config, "trial", config.sweep.parallel)
            check_shared(folder.path, "output_dir, or --out,")
            if not _cache_is_ready(config) and config.anchors is not None:
                build(config)
            check_inputs(config)
            check_cache(plan)
            try:
                search(folder, plan, tracking, say)
            except BaseException:
                tracking.end("stopped")
                raise
        remove_tree(folder.scratch)  # left by a sweep that was killed after its trials had ended
        for trial in folder.trials():
            tracking.sync(trial)  # it may have been killed between the end of a trial and its log
        result = read_results(folder)
        write_sweep_report(result, folder, shlex.join(command_line()))
        try:
            write_results(result, folder)
        except CraftError:
            tracking.end("failed")
            raise
        assert result.best is not None
        tracking.end("finished", folder.trial(result.best.number))
    for line in conclusion(result, folder):
        say(line)
    return bool(result.best.feasible)


def _hashes(config: Experiment) -> dict[str, str]:
    """Hashes of the data that a trial trains on and is validated on, by key and path. A simulator has none."""
    found = {task_name(config): open_task(config.task).fingerprint}
    for skill, eval_set in eval_sets(config, "validation"):
        if isinstance(eval_set, SampleEvalSet):
            key = f"{key_of(config, 'validation', skill)}.data"
            found[f"{key}.path {eval_set.data.path}"] = open_source(eval_set.data, key).fingerprint
    return found


def _inputs(eval_set: EvalSet) -> DataConfig | HarnessConfig | RolloutConfig:
    """What a model is scored on."""
    if isinstance(eval_set, HarnessEvalSet):
        return eval_set.harness
    return eval_set.rollout if isinstance(eval_set, RolloutEvalSet) else eval_set.data


@contextmanager
def _resume_advice(folder: SweepFolder) -> Iterator[None]:
    """Say how to resume an interrupted sweep. A mistake before the first trial leaves no plan behind, so that the same
    command can be given again."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: resume with craft-ray sweep --resume {folder.path}") from None
    except Exception:
        if folder.new and not folder.trials():
            folder.plan.unlink()
        raise


@contextmanager
def sweep_lock(folder: SweepFolder) -> Iterator[None]:
    """Only one process runs a sweep.

    Raises:
        ConfigError: another process runs it.
    """
    refusal = ConfigError(f"another process is running the sweep {folder.path}: wait until it is done, or end it")
    with exclusive_lock(folder.path / ".lock", refusal):
        yield


def check_plan(plan: Plan) -> None:
    """Check everything that can be checked before a process starts.

    Raises:
        CraftError: the objective, the space, the scheduler or the data do not fit.
    """
    config = plan.config
    if config.workers.elastic:
        raise ConfigError(
            f"workers.num_workers is {config.workers.count}, but the trials of a sweep are compared and need one "
            f"number: set e.g. workers.num_workers={config.workers.least}"
        )
    objective_of(config)
    check_scheduler(plan)
    sampler_of(plan)
    for skill, eval_set in eval_sets(config, "validation"):
        open_eval_set(eval_set, key_of(config, "validation", skill))
    check_space(plan.space, config, lambda _: None)
    if _cache_is_ready(config):
        check_cache(plan)


def _cache_is_ready(config: Experiment) -> bool:
    """Whether the cache that trials read is complete, if they read one."""
    return config.craft.anchor_cache_dir is None or is_complete(storage_path(config.craft.anchor_cache_dir))


def check_cache(plan: Plan) -> None:
    """Refuse a space whose settings need what the cache does not hold."""
    if plan.config.craft.anchor_cache_dir is None:
        return
    cache = storage_path(plan.config.craft.anchor_cache_dir)
    identity = read_manifest(cache).identity

    def cached(config: Experiment) -> None:
        if config.craft.enabled:
            select(cache, identity, config)

    check_space(plan.space, plan.config, cached)


def search(
    folder: SweepFolder, plan: Plan, tracking: SweepTracking, say: Say = print, run_trial: RunTrial | None = None
) -> None:
    """Run the trials that are open.

    Args:
        run_trial: what runs a trial's config; by default a trainer for several workers, otherwise the trial's process.
    """
    config = plan.config
    multi = config.workers.most > 1
    join(dashboard=multi)
    os.environ.update(TUNE_SETTINGS)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial has its line in the trial log
    remove_tree(folder.scratch)
    trainable = tune.with_parameters(
        CraftTrial, sweep=str(folder.path), run_trial=run_trial or (on_trainer if multi else in_process)
    )
    found = room(config, "trial", config.sweep.parallel, say)
    memory = {} if found.memory is None else {"memory": found.memory}
    # Ray Train places the workers of a trainer; the process that watches them takes nothing that a worker needs.
    bundle = {"memory": 1.0} if multi else resources(config.workers) | memory
    how = _population(folder, plan) if config.sweep.scheduler == "pbt" else _sampled(folder, plan, found)
    with screen() as shown:
        running = RunningTrials(folder, plan, shown, say)
        log = TrialLog(folder, plan, trial_count(plan), tracking, say, running, shown.progress)
        try:
            with running.followed():
                _tuner(folder, plan, trainable, bundle, how, log).fit()
        finally:
            remove_tree(folder.scratch)


def _tuner(
    folder: SweepFolder, plan: Plan, trainable: Any, bundle: dict[str, float], how: dict[str, Any], log: TrialLog
) -> Tuner:
    config = plan.config
    return Tuner(
        tune.with_resources(trainable, PlacementGroupFactory([bundle])),
        param_space=how.pop("param_space"),
        tune_config=TuneConfig(
            metric="score",
            mode="max",
            scheduler=scheduler_of(folder, plan),
            reuse_actors=config.workers.most <= 1,
            **how,
        ),
        run_config=RunConfig(
            name=folder.path.name,
            storage_path=str(folder.scratch),
            verbose=0,
            failure_config=FailureConfig(max_failures=config.sweep.max_failures + 1),  # the trial log counts
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            callbacks=[log],
        ),
    )


def _sampled(folder: SweepFolder, plan: Plan, found: Room) -> dict[str, Any]:
    """Tune's arguments where a sampler proposes the trials."""
    return {
        "param_space": {},
        "search_alg": PlannedSearch(folder, plan, sampler_of(plan)),
        "num_samples": trial_count(plan),
        "max_concurrent_trials": found.count,
    }


def _population(folder: SweepFolder, plan: Plan) -> dict[str, Any]:
    """Tune's arguments for a population. All its trials exist from the start and take turns: nothing can be learnt from
    a trial that does not exist yet."""

    def name(trial: Trial) -> str:  # the first call that Tune makes for a trial
        folder.assign(trial.trial_id, trial.config[TRIAL])
        return str(trial)

    return {"param_space": {TRIAL: tune.grid_search(begin_population(folder, plan))}, "trial_name_creator": name}
