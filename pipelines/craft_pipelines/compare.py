"""The arms and variants side by side: one cache, the same steps and data, over seeds; then the report.

Processes are expensive to start, so the runs are divided into as many groups as the cluster can hold trainers, and each
trainer trains the runs of its group one after the other. A comparison that is started again skips finished runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from typing import Any

import ray
import torch

from craft_pipelines.anchors import build
from craft_pipelines.console import QuarterObserver, Together, following, line, screen
from craft_pipelines.outputs import check_kept
from craft_pipelines.room import Room, room
from craft_pipelines.session import join
from craft_pipelines.train import PlannedRun, check_inputs, run_on_trainer, tracked
from craft_ray.anchors.manifest import is_complete, read_manifest
from craft_ray.config import ARMS, Experiment
from craft_ray.data.task import open_task
from craft_ray.errors import CacheRefused, ConfigError
from craft_ray.report.html import write_report
from craft_ray.run.folder import RunFolder, command_line
from craft_ray.run.identity import ModelIdentity, check_config, check_model, check_task, model_files, record
from craft_ray.run.interpolation import interpolated
from craft_ray.run.locks import only_command
from craft_ray.run.mirror import mirrored_folder
from craft_ray.storage.lock import exclusive_lock
from craft_ray.storage.paths import StoragePath, is_object, storage_path
from craft_ray.tracking.observer import TrackingObserver
from craft_ray.tracking.opening import open_trackers
from craft_ray.tracking.tracker import Tracker
from craft_ray.workers import OneWorker

CONSTRAINED_COST = 2.0
"""Expected time of a constrained run relative to plain fine-tuning; only used to balance the groups."""
LOCKED_AT_ONCE = 16
"""In an object store taking a lock takes over a second."""


def compare(config: Experiment, arms: Sequence[str], seeds: Sequence[int], folder: StoragePath) -> dict[str, Any]:
    """Run every arm on every seed into `folder/runs`, and write `report.html` and `result.json` into `folder`.

    Raises:
        CacheRefused, ConfigError, ...: as in the single stages.
    """
    check_kept(folder, "output_dir, or --out,")
    refusal = ConfigError(f"another process is running the comparison {folder}: wait until it is done, or stop it")
    with exclusive_lock(folder / ".lock", refusal):
        return _compare(config, arms, seeds, folder)


def _compare(config: Experiment, arms: Sequence[str], seeds: Sequence[int], folder: StoragePath) -> dict[str, Any]:
    for arm in arms:
        source = config.compare.interpolated(arm)
        if source is not None and source not in arms:
            raise ConfigError(f"{arm} interpolates the runs of {source}, which is not among the arms: add it")
    runs = [_planned(arm_config(config, arm, seed, folder, arms)) for arm in arms for seed in seeds]
    open_ones = any(run.folder.finished() is None for run in runs)
    trackers = open_trackers(config.tracking, folder / "runs") if open_ones else []
    if config.craft.anchor_cache_dir is not None and config.anchors is not None:
        cache = storage_path(config.craft.anchor_cache_dir)
        if not (is_complete(cache) and read_manifest(cache).identity.imported):  # there is nothing to build it from
            build(config)
    for run in runs[:: len(seeds)]:
        check_inputs(run.config)
    _check_finished(runs)
    mixed = [run for run in runs if config.compare.interpolated(run.config.arm)]
    open_runs = [run for run in runs if run.folder.finished() is None]
    if len(open_runs) < len(runs):
        print(f"{len(runs) - len(open_runs)} of {len(runs)} runs are finished already")
    for run in open_runs:
        if not run.folder.started:
            run.folder.write_environment(command_line())
    to_train = [run for run in open_runs if run not in mixed]
    if to_train:
        _train_groups(to_train, trackers)
    for run in [run for run in mixed if run in open_runs]:
        source = config.compare.interpolated(run.config.arm)
        _interpolate(run, next(r for r in runs if (r.config.arm, r.config.seed) == (source, run.config.seed)))
    return write_report([run.folder for run in runs], folder, title=config.name, command=shlex.join(command_line()))


def arm_config(config: Experiment, arm: str, seed: int, folder: StoragePath, arms: Sequence[str]) -> Experiment:
    """The experiment of one arm and seed.

    The baseline keeps the cache: it does not train on it, but is measured by the loss of the preferred other arm. Only
    what a budget follows is validated, because nothing is chosen here, unless each run keeps its best checkpoint. The
    other arms are not part of a run's config, so that an arm can be added to a finished comparison.
    """
    settings = _settings(config, arm)
    measured_by = preferred(config, [other for other in arms if other != "baseline"])
    if not settings["enabled"] and measured_by is not None:
        settings = _settings(config, measured_by) | settings
    changes: dict[str, Any] = {
        "adapter": config.compare.adapter_settings(arm, config.adapter),
        "variant": arm if arm in config.compare.variants else None,
        "seed": seed,
        "output_dir": str(folder / "runs"),
        "compare": {"parallel": config.compare.parallel},
        **{f"craft.{key}": value for key, value in settings.items()},
        **{f"train.{key}": value for key, value in config.compare.train_settings(arm).items()},
    }
    if settings.get("epsilon_unit", config.craft.epsilon_unit) != config.craft.epsilon_unit:
        changes |= {f"skills.{name}.epsilon_start": None for name in config.skills}  # they are in the other unit
    if settings.get("keep", 0.0) is None:  # a penalty, which no target moves
        changes |= {f"skills.{name}.keep": None for name in config.skills}
    if config.compare.validate_arms or config.compare.interpolated(arm) is not None:
        return config.changed(changes)
    return config.changed(changes | _unvalidated(config, config.changed(changes).kept_parts()))


def _unvalidated(config: Experiment, kept: Collection[str | None]) -> dict[str, Any]:
    """What leaves out the validations that nothing follows: those of skills without a part to keep."""
    if config.train.keep_best is not None:
        return {}
    if None not in kept:
        changes: dict[str, Any] = {"validation": {"every": config.validation.every if kept else 0}}
    else:
        changes = {"validation.new": None}
    return changes | {f"skills.{name}.validation": None for name in config.skills if name not in kept}


def _settings(config: Experiment, arm: str) -> dict[str, Any]:
    """
    Raises:
        ConfigError: the arm's loss is counted in another unit than the config's budget, and it has no own budget.
    """
    settings = config.compare.craft_settings(arm, config.craft)
    if settings.get("epsilon_start", config.craft.epsilon_start) is None:
        where = f"compare.{arm}" if arm in ARMS else f"compare.variants.{arm}"
        raise ConfigError(
            f"{where}.epsilon_start is missing: the loss of {arm} is counted in {settings['epsilon_unit']}, and "
            f"craft.epsilon_start {config.craft.epsilon_start:g} in {config.craft.epsilon_unit}; specify a budget for "
            f"it, or choose other arms (--arms)"
        )
    return settings


def preferred(config: Experiment, arms: Sequence[str]) -> str | None:
    """The constrained arm whose loss measures plain fine-tuning: the config's retention mode if it is compared, else
    hidden, token_ce, or the first variant; None if all arms are ways of plain fine-tuning."""
    order = (config.craft.retention_mode, "hidden", "token_ce", *config.compare.variants)
    measuring = (arm for arm in order if arm in arms and config.compare.craft_settings(arm, config.craft)["enabled"])
    return next(measuring, None)


def met(result: dict[str, Any]) -> bool:
    """Whether every run of a comparison whose multiplier follows a budget met its target, or the budget on held-out
    anchors where none is stated."""
    return all(run["feasible"] for run in result["runs"] if run.get("multiplier") == "adaptive")


def _interpolate(run: PlannedRun, source: PlannedRun) -> None:
    """Make an arm of the finished run of another arm, in this process."""
    workers = OneWorker(torch.device("cuda" if run.config.workers.use_gpu and torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(run.config.workers.threads)
    label = f"[{run.config.arm} seed {run.config.seed}]"
    task = open_task(run.config.task).fingerprint
    with mirrored_folder(run.folder, main=True) as folder:
        record(folder, run.config, task, ModelIdentity(None, model_files(run.config), None))
        interpolated(run.config, source.folder, folder, workers, lambda line: print(f"{label} {line}", flush=True))


def _planned(config: Experiment) -> PlannedRun:
    """A run to train, or one that is taken over as it is: it has to be the same run.

    Raises:
        ConfigError: the run in the folder began with another config.
    """
    folder = RunFolder(storage_path(config.output_dir) / config.run_name)
    if folder.started:
        check_config(folder, config)
    return PlannedRun(config, folder)


def _check_finished(runs: Sequence[PlannedRun]) -> None:
    """Check that finished runs were trained on the data, from the model and with the cache that are there now; open
    ones check that themselves.

    Raises:
        ConfigError: a run was trained on other data, or from another model.
        CacheRefused: it was trained with another cache.
    """
    fingerprints: dict[str, str | None] = {}
    finished = [(run.config, run.folder, result) for run in runs if (result := run.folder.finished()) is not None]
    for config, folder, result in finished:
        if (task := config.task.model_dump_json()) not in fingerprints:
            fingerprints[task] = open_task(config.task).fingerprint
        check_task(folder, config, str(fingerprints[task]))
        if (model := config.model.path) not in fingerprints:
            fingerprints[model] = None if is_object(model) else model_files(config)
        check_model(folder, config, ModelIdentity(None, fingerprints[model], None))
        if (cache := config.craft.anchor_cache_dir) is None or result.get("cache") is None:
            continue
        if (found := read_manifest(storage_path(cache)).fingerprint) != result["cache"]:
            raise CacheRefused(
                f"the finished run {folder.path} was trained with the anchor cache {result['cache']}, and "
                f"craft.anchor_cache_dir {cache} holds {found}: restore that cache, or compare under another name=..."
            )


def _train_groups(runs: Sequence[PlannedRun], trackers: Sequence[Tracker]) -> None:
    config, found = runs[0].config, Room(1, None)
    if config.workers.num_workers:
        join()
        found = room(config, "run", config.compare.parallel, line)
    groups = balance(runs, found.count)
    with ExitStack() as stack:
        together = Together(stack.enter_context(screen()), len(runs), sum(run.config.train.steps for run in runs))
        with ThreadPoolExecutor(LOCKED_AT_ONCE) as pool:
            list(pool.map(lambda run: stack.enter_context(only_command(run.folder)), runs))
        for run in runs:
            label = f"{run.config.arm} seed {run.config.seed}"
            observer = QuarterObserver(label, run.config.train.steps, run.config.arm, together)
            found_by = [tracked(tracker, run) for tracker in trackers]
            watched = stack.enter_context(TrackingObserver(observer, found_by, partial(_report, together, label)))
            stack.enter_context(following(run.folder.progress, watched))
        if len(groups) == 1:
            run_on_trainer(groups[0], memory=found.memory)
            return
        with ThreadPoolExecutor(len(groups)) as pool:
            try:
                for done in as_completed([pool.submit(run_on_trainer, group, memory=found.memory) for group in groups]):
                    done.result()
            except BaseException:
                ray.shutdown()  # ends the other groups, so that a mistake is reported at once, not hours later
                raise


def _report(together: Together, label: str, text: str) -> None:
    together.screen.line(f"[{label}] {text}")


def balance(runs: Sequence[PlannedRun], count: int) -> list[list[PlannedRun]]:
    """Divide runs into at most `count` groups: the most expensive first, each into the group with the least load."""
    groups: list[list[PlannedRun]] = [[] for _ in range(min(count, len(runs)))]
    load = [0.0] * len(groups)
    for run in sorted(runs, key=_cost, reverse=True):
        lightest = load.index(min(load))
        groups[lightest].append(run)
        load[lightest] += _cost(run)
    return groups


def _cost(run: PlannedRun) -> float:
    return CONSTRAINED_COST if run.config.craft.enabled else 1.0


def default_folder(config: Experiment) -> StoragePath:
    return storage_path(config.output_dir) / f"{config.name}-compare"
