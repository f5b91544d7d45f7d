"""Which setting is tried next: drawn at random, or by Optuna's tree-structured Parzen estimator with constraints."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

from ray.tune.search import Searcher

from craft_pipelines.sweep.trial import TRIAL
from craft_ray.errors import ConfigError
from craft_ray.extras import install, missing
from craft_ray.sweep.space import Distribution, Params
from craft_ray.sweep.trials import Plan, Report, SweepFolder


class Sampler(Protocol):
    """Draws settings and receives their results."""

    def propose(self, number: int, known: Params | None) -> Params:
        """The setting of trial `number`: a new one, or the `known` one of a trial that has started."""
        ...

    def tell(self, number: int, report: Report | None, complete: bool) -> None:
        """Take in the last report of a trial; None if it failed."""
        ...


class RandomSampler:
    """Each setting is a function of the seed and the trial's number."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def propose(self, number: int, known: Params | None) -> Params:
        return known or self._plan.space.draw(self._plan.config, self._plan.config.sweep.seed, number)

    def tell(self, number: int, report: Report | None, complete: bool) -> None:
        pass


class TpeSampler:
    """Optuna's TPE (Bergstra et al., 2011), with the violations of the bounds as its constraints. A trial that was
    stopped early counts as pruned: it says less than a complete one."""

    def __init__(self, plan: Plan) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._plan = plan
        assert plan.config.objective is not None
        sampler = optuna.samplers.TPESampler(
            seed=plan.config.sweep.seed,
            n_startup_trials=min(10, max(1, plan.config.sweep.samples // 3)),
            constant_liar=True,  # trials that run at the same time must differ
        )
        maximize = plan.config.objective.maximize is not None
        self._study = optuna.create_study(sampler=sampler, direction="maximize" if maximize else "minimize")
        self._asked: dict[int, Any] = {}
        self._states = optuna.trial.TrialState

    def propose(self, number: int, known: Params | None) -> Params:
        space, base = self._plan.space, self._plan.config
        if known is not None:
            fixed: dict[str, Any] = {}

            def fix(key: str, name: str, case: Distribution) -> Any:
                fixed[name] = case.options.index(known[key]) if case.options else known[key]
                return known[key]

            space.choose(base, fix)
            self._study.enqueue_trial(fixed)
        trial = self._asked[number] = self._study.ask()
        return space.choose(base, lambda _, name, case: _suggest(trial, name, case))

    def tell(self, number: int, report: Report | None, complete: bool) -> None:
        trial = self._asked.pop(number)
        if report is None:
            self._study.tell(trial, state=self._states.FAIL)
            return
        for metric, violation in report["violations"].items():
            trial.set_constraint(metric, violation)  # above 0 where a bound is broken, as Optuna has it
        if complete:
            self._study.tell(trial, report["value"])
        else:
            trial.report(report["value"], report["step"])
            self._study.tell(trial, state=self._states.PRUNED)


def _suggest(trial: Any, name: str, case: Distribution) -> Any:
    if case.options:
        return case.options[trial.suggest_categorical(name, range(len(case.options)))]
    low, high = case.numbers[:2]
    if case.kind == "randint":
        return trial.suggest_int(name, int(low), int(high) - 1)
    return case.rounded(trial.suggest_float(name, low, high, log=case.kind == "loguniform"))


def sampler_of(plan: Plan) -> Sampler:
    """The sampler that the config asks for.

    Raises:
        ConfigError: Optuna is not installed, or the space has a grid, which TPE does not draw from.
    """
    if plan.config.sweep.sampler == "random":
        return RandomSampler(plan)
    if missing("optuna"):
        raise ConfigError(f"sweep.sampler=tpe needs Optuna: {install('optuna')}, or use sampler random")
    if len(plan.space.grid()) > 1:
        raise ConfigError(f"{plan.space.name} has a grid, which sweep.sampler=tpe does not draw from: write choice")
    return TpeSampler(plan)


class PlannedSearch(Searcher):
    """Gives Tune the trials of a sweep by number: those that have started keep their settings, the others get new ones.

    A setting is on disk before Tune gets it, so no trial is lost, whatever is killed.
    """

    def __init__(self, folder: SweepFolder, plan: Plan, sampler: Sampler) -> None:
        super().__init__(metric="score", mode="max")
        self._folder = folder
        self._sampler = sampler
        self._open: dict[str, int] = {}
        self._todo = [
            number for number in range(trial_count(plan)) if folder.trial(number).outcome().status != "failed"
        ]

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if not self._todo:
            return Searcher.FINISHED
        number = self._todo.pop(0)
        trial = self._folder.trial(number)
        known = trial.params()
        params = self._sampler.propose(number, known)
        if known is None:
            trial.begin(params)
        self._folder.assign(trial_id, number)
        self._open[trial_id] = number
        return {TRIAL: number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._open.pop(trial_id)
        trial = self._folder.trial(number)
        reports = trial.reports()
        # Tune also calls a trial done if its scheduler has stopped it.
        complete = trial.outcome().status == "finished"
        self._sampler.tell(number, None if error or not reports else reports[-1], complete)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the trials' folders hold the state."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep is resumed from its folders, not from Tune's state")


def begin_population(folder: SweepFolder, plan: Plan) -> list[int]:
    """The open trials of population based training, for which Tune has no searcher: all start at once.

    Each draws its first setting at random.
    """
    numbers = open_trials(folder, plan)
    for number in numbers:
        trial = folder.trial(number)
        if trial.params() is None:
            trial.begin(plan.space.draw(plan.config, plan.config.sweep.seed, number))
    return numbers


def open_trials(folder: SweepFolder, plan: Plan) -> list[int]:
    """The trials that have not ended, or not started."""
    return [number for number in range(trial_count(plan)) if folder.trial(number).outcome().status == "open"]


def trial_count(plan: Plan) -> int:
    """How many settings are tried."""
    return plan.config.sweep.samples * len(plan.space.grid())
