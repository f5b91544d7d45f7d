"""What schedulers and samplers get, and what they decide. Without Ray processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from craft_pipelines.sweep.driver import check_plan
from craft_pipelines.sweep.schedulers import MedianNow, check_scheduler, longest
from craft_pipelines.sweep.search import PlannedSearch, TpeSampler, sampler_of
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from craft_ray.config import Experiment, parse_config
from craft_ray.errors import ConfigError
from craft_ray.sweep.space import parse_space
from craft_ray.sweep.trials import Plan, SweepFolder

EVAL = {"data": {"path": "data.jsonl", "columns": {"response": "answer"}}}


def plan(knobs: dict[str, Any] | None = None, **changes: Any) -> Plan:
    config = parse_config(
        {
            "model": {"path": "org/model"},
            "task": {"path": "org/task"},
            "train": {"steps": 100},
            "craft": {"anchor_cache_dir": "anchors"},
            "validation": {"every": 20, "old": EVAL, "new": EVAL},
            "objective": {"maximize": "new/score", "subject_to": {"old/ratio": ">= 0.9"}},
        },
        "test",
    )
    config = config.changed({key.replace("__", "."): value for key, value in changes.items()})
    return Plan(config, parse_space(knobs or {"craft.lambda_lr": {"uniform": [0.1, 0.5]}}, "space.yaml"), ["test"])


# --- the median rule ----------------------------------------------------------------------------------------------


def decisions(scores: dict[str, list[float]]) -> dict[str, list[str]]:
    """The rule's decisions on trials that report in turn at steps 10, 20, ..."""
    rule = MedianNow(time_attr="step", metric="score", mode="max", grace_period=20, min_samples_required=2)
    trials = {name: Trial("none", trial_id=name, stub=True) for name in scores}
    controller: Any = SimpleNamespace(get_live_trials=list)
    said: dict[str, list[str]] = {name: [] for name in scores}
    for number in range(max(map(len, scores.values()))):
        for name, values in scores.items():
            if TrialScheduler.STOP in said[name]:
                continue
            result = {"step": 10 * (number + 1), "score": values[number]}
            said[name].append(rule.on_trial_result(controller, trials[name], result))
    return said


def test_a_trial_that_lost_the_old_skill_is_stopped_however_well_it_started() -> None:
    said = decisions({"a": [0.6, 0.6, 0.6], "b": [0.62, 0.62, 0.62], "c": [0.9, -0.5, -0.9]})
    assert said["c"][0] == TrialScheduler.CONTINUE
    assert said["c"][1] == TrialScheduler.STOP
    assert said["a"][:2] == [TrialScheduler.CONTINUE] * 2


def test_a_trial_above_the_median_continues() -> None:
    said = decisions({"a": [0.6, 0.6], "b": [0.62, 0.62], "c": [-0.5, 0.9]})
    assert said["c"][1] == TrialScheduler.CONTINUE


# --- combinations that are refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "knobs", "words"),
    [
        ({"validation__every": 0}, None, "acts at each validation, and validation.every is 0 of 100 steps: set it to"),
        ({"validation__every": 100}, None, "validation.every is 100 of 100 steps"),
        ({"sweep__grace": 5}, None, "sweep.grace 5 times validation.every 20 is not less than a run's 100 steps"),
        ({"sweep__grace": 5, "sweep__scheduler": "median"}, None, "scheduler median would never act"),
        ({"sweep__scheduler": "pbt", "sweep__repeat": 2}, None, "leave sweep.repeat out"),
        ({"sweep__scheduler": "pbt", "sweep__sampler": "tpe"}, None, "draws its settings itself"),
        ({"sweep__scheduler": "pbt", "sweep__parallel": 1}, None, "leave sweep.parallel out"),
        ({"sweep__scheduler": "pbt"}, {"seed": {"randint": [0, 9]}}, "cannot change seed during training"),
        ({"sweep__scheduler": "pbt"}, {"craft.enabled": {"choice": [True, False]}}, "cannot change craft.enabled"),
        ({"sweep__scheduler": "pbt"}, {"adapter.r": {"choice": [2, 4]}}, "cannot change adapter.r during training"),
        ({"sweep__scheduler": "pbt"}, {"craft.lambda_lr": {"grid": [0.1, 0.2]}}, "cannot change a grid"),
        ({"sweep__scheduler": "pbt", "workers__num_workers": 2}, None, "set workers.num_workers to 1"),
    ],
)
def test_a_scheduler_that_has_nothing_to_act_on_is_refused(
    changes: dict[str, Any], knobs: dict[str, Any] | None, words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_scheduler(plan(knobs, **changes))
    assert words in refused.value.message
    assert "\n" not in refused.value.message


def test_a_sweep_has_one_number_of_workers() -> None:
    with pytest.raises(ConfigError) as refused:
        check_plan(plan(workers__num_workers=[1, 2]))
    assert "workers.num_workers is 1 to 2" in refused.value.message
    assert "set e.g. workers.num_workers=1" in refused.value.message


def test_a_searched_length_is_the_schedulers_length() -> None:
    assert longest(plan()) == 100
    assert longest(plan({"train.steps": {"choice": [50, 300]}})) == 300


# --- what a sampler is given ---------------------------------------------------------------------------------------


def start_search(config: Experiment, folder: Path, asked: Plan) -> tuple[SweepFolder, PlannedSearch, TpeSampler]:
    sampler = sampler_of(asked)
    assert isinstance(sampler, TpeSampler)
    sweep = SweepFolder(folder)
    return sweep, PlannedSearch(sweep, asked, sampler), sampler


def report(step: int, value: float, violation: float) -> dict[str, Any]:
    return {"step": step, "value": value, "violations": {"old/ratio": violation}}


def test_tpe_gets_violations_and_which_trials_were_stopped(tmp_path: Path) -> None:
    """Tune calls both finished and stopped trials done."""
    asked = plan(sweep__sampler="tpe", sweep__samples=3)
    sweep, search, sampler = start_search(asked.config, tmp_path / "sweep", asked)
    for number, (status, step, violation) in enumerate(
        [("finished", 100, 0.0), ("stopped", 20, 0.5), ("failed", None, None)]
    ):
        search.suggest(f"id{number}")
        trial = sweep.trial(number)
        if step is not None:
            trial.add_report(report(step, 0.5 + number / 10, violation))
        trial.end(status)  # type: ignore[arg-type]
        search.on_trial_complete(f"id{number}", {"done": True}, error=status == "failed")
    known = sampler._study.trials
    assert [trial.state.name for trial in known] == ["COMPLETE", "PRUNED", "FAIL"]
    assert known[0].value == 0.5
    assert known[1].intermediate_values == {20: 0.6}
    assert known[0].constraints == {"old/ratio": 0.0}
    assert known[1].constraints == {"old/ratio": 0.5}

    again, resumed, other = start_search(asked.config, tmp_path / "sweep", asked)
    for number in (0, 1):
        resumed.suggest(f"new{number}")
        resumed.on_trial_complete(f"new{number}", {"done": True})
    assert [trial.state.name for trial in other._study.trials] == ["COMPLETE", "PRUNED"]
    for before, after in zip(known, other._study.trials, strict=False):  # settings have four digits
        assert after.params == pytest.approx(before.params, rel=1e-3)
    assert [trial.params() for trial in again.trials()] == [trial.params() for trial in sweep.trials()]
