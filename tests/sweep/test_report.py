"""The report of a sweep: known answers, and a self-contained page, whatever happened to the trials."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from craft_pipelines.export import export

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError
from craft_ray.run.folder import RunFolder
from craft_ray.run.objective import judge
from craft_ray.sweep.html import table_rows, write_sweep_report
from craft_ray.sweep.importance import association, common_step, importance, ranked
from craft_ray.sweep.parallel import axes_of, broken
from craft_ray.sweep.plots import pareto_front, pareto_metrics
from craft_ray.sweep.results import SweepResult, read_results
from craft_ray.sweep.space import parse_space
from craft_ray.sweep.trials import Plan, Status, SweepFolder
from craft_ray.sweep.wording import headline
from tests.support.reports import EVIL, Page

EVERY, STEPS = 25, 100
BOUNDED = {"maximize": "new/score", "subject_to": {"old/ratio": ">= 0.95"}}
SPACE: dict[str, Any] = {
    "craft.lambda_lr": {"loguniform": [0.01, 1.0]},
    "craft.epsilon_schedule": {"choice": ["constant", "cosine"]},
    "craft.epsilon_end": {"uniform": [0.02, 0.05], "when": {"craft.epsilon_schedule": "cosine"}},
}
EVERYTHING: dict[str, Any] = SPACE | {
    "craft.positions": {"choice": [["suffix"], ["text_last"]]},
    "craft.use_grad_projection": {"choice": [True, False]},
    "craft.retention_freq": {"choice": [1, 2, 5]},
    "craft.anchor_batch_size": {"randint": [8, 64]},
    "train.warmup_steps": {"quniform": [0, 100, 25]},
    "craft.conflict_threshold": {"grid": [-0.1]},
}


# -- sweep folders, as a sweep leaves them


def config_of(objective: Mapping[str, Any] = BOUNDED, metric: str = "exact_match", **sweep: Any) -> Experiment:
    data = {"path": "nowhere", "columns": {"response": "response"}}
    eval_set = {"metric": metric, "data": data}
    return Experiment.model_validate(
        {
            "name": "made-up",
            "model": {"path": "nowhere"},
            "task": data,
            "craft": {"enabled": True, "anchor_cache_dir": "nowhere", "epsilon_start": 0.05},
            "train": {"steps": STEPS},
            "validation": {"old": eval_set, "new": eval_set, "every": EVERY},
            "objective": objective,
            "sweep": sweep,
        }
    )


class MadeUp:
    """A sweep whose trials report the given numbers."""

    def __init__(self, path: Path, config: Experiment | None = None, space: Mapping[str, Any] = SPACE) -> None:
        self.folder = SweepFolder(path / "sweep")
        self.plan = Plan(
            config or config_of(), parse_space(dict(space), "made-up space"), ["craft-ray", "sweep", "a b.yaml"]
        )
        self.folder.begin(self.plan)
        self.count = 0

    def add(
        self,
        params: Mapping[str, Any],
        validations: Sequence[Mapping[str, float]],
        status: Status = "finished",
        reason: str | None = None,
        seeds: Sequence[Sequence[Mapping[str, float]]] = (),
        logged: bool = True,
    ) -> None:
        """A trial with these metrics at its validations, and on further `seeds` at their ends."""
        trial = self.folder.trial(self.count)
        self.count += 1
        trial.begin(dict(params))
        assert self.plan.config.objective is not None
        ends = [([record], (index + 1) * EVERY) for index, record in enumerate(validations)]
        ends += [(list(runs), (index + 2) * STEPS) for index, runs in enumerate(seeds)]
        for runs, step in ends:
            verdict = judge(self.plan.config.objective, runs)
            means = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
            trial.add_report(
                {
                    "step": step, "seeds": len(runs), "params": dict(params), "metrics": means,
                    "value": verdict.value, "violations": verdict.violations, "feasible": verdict.feasible,
                    "score": verdict.score, "seconds": step / 10,
                }
            )  # fmt: skip
        if status != "open":
            trial.end(status, reason)
        if logged and validations:
            write_log(trial.run(0), len(validations) * EVERY)

    def result(self) -> SweepResult:
        return read_results(self.folder)

    def page(self, command: str = "craft-ray report") -> str:
        write_sweep_report(self.result(), self.folder, command)
        return (self.folder.path / "report.html").read_text()


def write_log(run: RunFolder, steps: int) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    run.append_metrics(
        [
            {"step": step, "craft/retention_loss": None if step % 2 else 0.2 / step, "craft/epsilon": 0.05}
            for step in range(1, steps + 1)
        ]
    )


def numbers(new: float, old: float) -> dict[str, float]:
    return {"new/score": new, "old/ratio": old}


def rising(new: float, old: float, count: int = STEPS // EVERY) -> list[dict[str, float]]:
    """Validations that end at these numbers."""
    return [numbers(new * (index + 1) / count, old) for index in range(count)]


def setting(number: int) -> dict[str, Any]:
    """A value for each knob of EVERYTHING, by its conditions."""
    params: dict[str, Any] = {"craft.lambda_lr": 0.01 * 1.3**number}
    params["craft.epsilon_schedule"] = ("constant", "cosine")[number % 2]
    if number % 2:
        params["craft.epsilon_end"] = 0.02 + 0.001 * number
    return params


def full_setting(number: int) -> dict[str, Any]:
    return setting(number) | {
        "craft.positions": (["suffix"], ["text_last"])[number % 2],
        "craft.use_grad_projection": number % 3 == 0,
        "craft.retention_freq": (1, 2, 5)[number % 3],
        "craft.anchor_batch_size": 8 + number,
        "train.warmup_steps": 25.0 * (number % 5),
        "craft.conflict_threshold": -0.1,
    }


def self_contained(text: str) -> Page:
    """The page, once it is certain that it loads nothing and refers only to itself."""
    page = Page(text)
    assert all(reference.startswith("#") for reference in page.references)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not re.search(r'(?:src|href)\s*=\s*["\']?https?:', text)
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(page.ids)
    assert not re.search(r"\bNone\b|\bnan\b", page.text)
    return page


# -- importance


def test_ranks_share_their_mean() -> None:
    assert ranked([30, 10, 20, 20]).tolist() == [4, 1, 2.5, 2.5]


def test_a_knob_that_fixes_the_order_has_all_of_it() -> None:
    for metric in ([0.1, 0.2, 0.5, 0.9, 1.7, 9.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]):
        found = association([1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0], metric, numeric=True)
        assert found.share == pytest.approx(1)
        assert found.chance is not None
        assert found.chance < 0.9


def test_spearman_by_hand() -> None:
    # ranks 1 2 3 4 5 against 2 1 4 3 5: sum of d^2 = 4, rho = 1 - 6 * 4 / 120 = 0.8; 1 - (1 - 0.64) * 4 / 3 = 0.52
    assert association([1, 2, 3, 4, 5], [20, 10, 40, 30, 50], numeric=True).share == pytest.approx(0.52)
    # sum of d^2 = 10, rho = 0.5: 1 - 0.75 * 4 / 3 = 0
    assert association([1, 2, 3, 4, 5], [30, 20, 10, 50, 40], numeric=True).share == pytest.approx(0, abs=1e-9)


def test_two_groups_by_hand() -> None:
    # ranks 1 2 4 | 3 5 6, means 7/3 and 14/3 about 3.5: 2 * 3 * (7/6)^2 = 49/6 of 17.5, eta^2 = 7/15
    # epsilon^2 = 1 - (8/15) * 5 / 4 = 1/3
    found = association(["a", "a", "a", "b", "b", "b"], [0.1, 0.2, 0.4, 0.3, 0.5, 0.6], numeric=False)
    assert found.share == pytest.approx(1 / 3)
    assert association([[1], [1], [2], [2]], [1, 2, 3, 4], numeric=False).share == pytest.approx(1 - 0.2 * 3 / 2)


@pytest.mark.parametrize(
    ("values", "metric", "numeric", "reason"),
    [
        ([5, 5, 5, 5], [1, 2, 3, 4], True, "the value is the same in all"),
        (["x"] * 4, [1, 2, 3, 4], False, "the value is the same in all"),
        ([1, 2, 3, 4], [7, 7, 7, 7], True, "the metric is the same in all"),
        ([1, 2, 3], [1, 2, 3], True, "too few trials"),
        (["a", "b", "c", "d"], [1, 2, 3, 4], False, "each trial has a different value"),
    ],
)
def test_a_share_that_cannot_be_computed_is_none(
    values: list[Any], metric: list[float], numeric: bool, reason: str
) -> None:
    found = association(values, metric, numeric)
    assert (found.share, found.chance, found.reason) == (None, None, reason)


def test_chance_shrinks_with_trials_and_one_in_twenty_exceeds_it() -> None:
    marks = [association(list(range(n)), [math.sin(99 * i) for i in range(n)], True).chance for n in (5, 10, 40)]
    assert marks[0] > marks[1] > marks[2] > 0.05  # type: ignore[operator]
    # of the 120 orders of 5 trials, 10 have |rho| of 0.9 or more; the 5 % point is that value's share
    assert marks[0] == pytest.approx(1 - (1 - 0.81) * 4 / 3)


def test_importance_compares_one_validation_and_the_trials_that_have_the_knob(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path)
    for number in range(10):  # 10 at step 25, 6 at 50, 3 at 100
        count = 4 if number < 3 else 2 if number < 6 else 1
        sweep.add(setting(number), rising(0.1 * number, 0.9, count), "finished" if count == 4 else "stopped")
    sweep.add(setting(0), [], "failed", "no memory")
    result = sweep.result()
    assert common_step(result) == 50
    found = importance(result, ["new/score", "old/ratio"])
    assert found is not None
    assert (found.step, found.trials) == (50, 6)
    assert found.of["craft.epsilon_end"]["new/score"].trials == 3
    assert found.of["craft.epsilon_end"]["new/score"].reason == "too few trials"
    assert found.of["craft.lambda_lr"]["old/ratio"].reason == "the metric is the same in all"


def test_importance_follows_what_the_metric_follows(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path)
    for number in range(8):
        sweep.add(setting(number), rising(0.1 * number, 0.9 + 0.01 * (number % 2)))
    found = importance(sweep.result(), ["new/score", "old/ratio"])
    assert found is not None
    assert found.of["craft.lambda_lr"]["new/score"].share == pytest.approx(1)
    assert found.of["craft.epsilon_schedule"]["old/ratio"].share == pytest.approx(1)
    assert found.of["craft.epsilon_schedule"]["new/score"].share == 0
    assert found.of["craft.lambda_lr"]["old/ratio"].share == 0


# -- the front, the axes, the words


def test_front_by_hand() -> None:
    points = [(0.2, 0.9), (0.5, 0.8), (0.5, 0.7), (0.4, 0.85), (0.9, 0.1), (0.3, 0.3), (0.9, 0.1)]
    assert {points[i] for i in pareto_front(points, (True, True))} == {(0.2, 0.9), (0.4, 0.85), (0.5, 0.8), (0.9, 0.1)}
    front = pareto_front(points, (True, True))
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
    assert len(front) == 5, "two equal points are both on it"
    assert {points[i] for i in pareto_front(points, (True, False))} == {(0.9, 0.1)}
    assert {points[i] for i in pareto_front(points, (False, False))} == {(0.2, 0.9), (0.3, 0.3), (0.9, 0.1)}
    assert pareto_front([], (True, True)) == []


@pytest.mark.parametrize(
    ("objective", "metric", "axes"),
    [
        (BOUNDED, "exact_match", ("new/score", "old/ratio")),
        ({"maximize": "new/ratio", "subject_to": {"old/ratio": ">= 0.9"}}, "perplexity", ("new/ratio", "old/ratio")),
        ({"minimize": "train/loss", "subject_to": {"old/ratio": ">= 0.9"}}, "perplexity", ("new/ratio", "old/ratio")),
        ({"maximize": "new/score"}, "exact_match", ("new/score", "old/ratio")),
    ],
)
def test_which_metrics_are_plotted_against_each_other(
    objective: Any, metric: str, axes: tuple[str, str], tmp_path: Path
) -> None:
    sweep = MadeUp(tmp_path, config_of(objective, metric))
    sweep.add(setting(0), [{"new/score": 0.5, "new/ratio": 2.0, "old/ratio": 0.9, "train/loss": 1.0}])
    chosen = pareto_metrics(sweep.result())
    assert chosen is not None
    assert tuple(each.key for each in chosen) == axes


def test_axes_of_knobs_and_metrics(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path, space=EVERYTHING)
    sweep.add(full_setting(0), rising(0.2, 0.9))
    sweep.add(full_setting(1) | {"craft.lambda_lr": 0.1}, rising(0.6, 1.0))
    result = sweep.result()
    axes = {axis.label: axis for axis in axes_of(result, result.trials)}
    assert axes["lambda_lr"].heights == pytest.approx([0, 0.5]), "a log axis: 0.1 is halfway from 0.01 to 1"
    assert axes["epsilon_end"].heights == [None, pytest.approx(1 / 30)]
    assert axes["positions"].ticks == [(0, '["suffix"]'), (1, '["text_last"]')]
    assert axes["use_grad_projection"].heights == [0, 1]
    assert axes["retention_freq"].heights == [0, 0.5]
    assert axes["conflict_threshold"].heights == [0.5, 0.5]
    assert axes["old/ratio"].limit == pytest.approx(0.5)
    assert axes["new/score"].heights == [0, 1]
    assert broken("craft.conflict_threshold") == "craft.\nconflict_\nthreshold"


def test_headline_of_a_best_within_the_bounds(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path)
    sweep.add(setting(0), rising(0.9, 0.90))
    sweep.add(setting(1), rising(0.8, 0.97))
    assert headline(sweep.result()) == [
        "Searched for the highest exact match on the new skill (new/score), with old skill relative to the teacher's "
        "(old/ratio) ≥ 95.0 %.",
        "Trial 1 is best: exact match on the new skill 80.0 %, old skill relative to the teacher's 97.0 %.",
    ]


def test_headline_where_no_trial_is_within_the_bounds(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path)
    sweep.add(setting(0), rising(0.9, 0.50))
    sweep.add(setting(1), rising(0.8, 0.90))
    sweep.add(setting(2), rising(0.8, 0.99, 1), "stopped")
    _, found, missed = headline(sweep.result())
    assert found.startswith("NO finished trial is within the bounds. The least violating is trial 1:")
    assert missed == "Its old skill relative to the teacher's is 90.0 % and misses ≥ 95.0 % by 5.00 percentage points."
    page = self_contained(sweep.page())
    assert "2 finished, 1 stopped early, 0 failed" in page.text
    assert "least violating, trial 1" in page.text
    assert "best, trial" not in page.text


def test_headline_without_bounds(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path, config_of({"minimize": "train/loss"}))
    sweep.add(setting(0), [{"train/loss": 0.5}])
    sweep.add(setting(1), [{"train/loss": 0.25}])
    assert headline(sweep.result()) == [
        "Searched for the lowest train/loss, without bounds.",
        "Trial 1 is best: train/loss 0.250.",
    ]
    page = self_contained(sweep.page())
    assert "against" not in page.text, "one metric is not plotted against another"
    assert "within the bounds" not in page.text.lower()


def test_headline_of_several_seeds_names_the_confidence_bound(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path, config_of(repeat=2))
    runs = [numbers(0.8, 0.95), numbers(0.8, 0.97)]
    sweep.add(setting(0), rising(0.8, 0.95), seeds=[runs])
    missed = headline(sweep.result())[2]
    # mean 0.96, s / sqrt(2) = 0.01, t of one degree of freedom at 95 % = 6.314: 0.96 - 0.06314 = 0.8969
    assert "is 96.0 % in the mean of 2 seeds, and its 95 % confidence bound, 89.7 %, misses ≥ 95.0 % by 5.31" in missed
    assert "Steps continue over the 2 seeds" in self_contained(sweep.page()).text


def test_order_of_the_table(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path)
    sweep.add(setting(0), [], "failed", "no memory")
    sweep.add(setting(1), rising(0.5, 0.99, 1), "stopped")
    sweep.add(setting(2), rising(0.9, 0.50))
    sweep.add(setting(3), rising(0.5, 0.98, 2), "stopped")
    sweep.add(setting(4), rising(0.6, 0.97))
    sweep.add(setting(5), rising(0.5, 0.40, 2), "stopped")
    rows = table_rows(sweep.result())
    assert [(row.rank, row.trial.number) for row in rows] == [
        (1, 4), (2, 2), (None, 3), (None, 5), (None, 1), (None, 0),
    ]  # fmt: skip
    assert rows[0].numbers == ["60.0 %", "97.0 %"]
    assert rows[0].knobs[-1] == "–"


# -- the page


def test_a_full_page(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path, space=EVERYTHING)
    for number in range(12):
        count = 4 if number % 3 == 0 else 2
        sweep.add(
            full_setting(number), rising(0.05 * number, 1.0 - 0.01 * number, count),
            "finished" if count == 4 else "stopped",
        )  # fmt: skip
    sweep.add(full_setting(12), [], "failed", EVIL)
    text = sweep.page(command=EVIL)
    page = self_contained(text)
    assert page.text.count(EVIL) == 2, "the reason and the command, as they are"
    for words in (
        "Old skill against new", "Association of knobs and metrics", "Settings and their results", "Over the steps",
        "Retention loss and its budget", "All trials", "4 finished, 8 stopped early, 1 failed", "craft-ray train",
        "craft-ray sweep 'a b.yaml'", "loguniform:", "keep_checkpoints: 2", "validation data, on which",
        "Trial 3 is best", "best, trial 3", "successive halving",
    ):  # fmt: skip
        assert words in page.text
    assert page.ids.count("pareto-trial-3") == 1
    assert "<title>trial 3, finished" in text, "the tooltip of a point names its trial"


def empty(sweep: MadeUp) -> str:
    return "No trial has started."


def one(sweep: MadeUp) -> str:
    sweep.add(setting(1), rising(0.5, 0.99))
    return "Trial 0 is best"


def only_failed(sweep: MadeUp) -> str:
    sweep.add(setting(0), [], "failed", "no memory")
    sweep.add(setting(1), [], "failed")
    return "All 2 trials failed. Trial 0: no memory"


def only_stopped(sweep: MadeUp) -> str:
    sweep.add(setting(0), rising(0.5, 0.9, 1), "stopped")
    sweep.add(setting(1), rising(0.5, 0.9, 3), "stopped")
    sweep.add(setting(2), [], "failed", "no memory")
    return "No trial has finished, so none is ranked. The one that got furthest is trial 1, stopped early at step 75"


def only_open(sweep: MadeUp) -> str:
    sweep.add(setting(0), [], "open")
    return "none has reported a number"


def failed_halfway(sweep: MadeUp) -> str:
    sweep.add(setting(0), rising(0.5, 0.99))
    sweep.add(setting(1), rising(0.5, 0.99, 2), "failed", "the task loss is nan at step 60")
    return "the task loss is nan at step 60"


def gaps(sweep: MadeUp) -> str:
    for number in range(5):
        sweep.add(setting(number), [numbers(0.5, 0.99) | {"new/ratio": 2.0}] * 4, logged=False)
    folder = sweep.folder.trial(4)
    last = folder.reports()[-1]
    folder.add_report({**last, "step": 101, "metrics": {"new/score": math.inf}})
    return "1 trial lacks one of the two numbers"


def without_logs(sweep: MadeUp) -> str:
    sweep.add(setting(0), rising(0.5, 0.99), logged=False)
    sweep.add(setting(1), rising(0.5, 0.99, 1), "stopped", logged=False)
    return "Trial 0 is best"


@pytest.mark.parametrize(
    "fill", [empty, one, only_failed, only_stopped, only_open, failed_halfway, gaps, without_logs]
)  # fmt: skip
def test_whatever_happened_to_the_trials(fill: Any, tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path)
    says = fill(sweep)
    text = sweep.page()
    page = Page(text) if fill is failed_halfway else self_contained(text)
    assert says in page.text
    assert ("Too few trials" in page.text) == (fill not in (empty, gaps))
    assert ("Retention loss and its budget" in page.text) == (fill in (one, only_stopped, failed_halfway))
    assert ("craft-ray train" in page.text) == (fill in (one, failed_halfway, gaps, without_logs))


@pytest.mark.parametrize(
    ("objective", "metric", "says"),
    [
        ({"minimize": "new/score", "subject_to": {"old/score": "<= 12"}}, "perplexity", "lowest perplexity on the new"),
        (
            {"minimize": "train/loss", "subject_to": {"heldout/retention_loss": "<= 0.5", "train/grad_norm": "<= 2"}},
            "exact_match",
            "with retention loss on held-out anchors (heldout/retention_loss) ≤ 0.500 and train/grad_norm ≤ 2.00",
        ),
        ({"maximize": "new/score", "subject_to": {"new/score": ">= 0.1"}}, "choice", "highest correct choices on the"),
        ({"maximize": "old/ratio", "subject_to": {"new/ratio": ">= 0"}}, "exact_match", "(new/ratio) ≥ 0.0 %"),
    ],
)
def test_other_objectives(objective: Any, metric: str, says: str, tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path, config_of(objective, metric))
    skills = ("old", "new") if "heldout" not in str(objective) else ()
    for number in range(5):
        validations = [
            {f"{skill}/{kind}": 0.1 * number + 3 * (kind == "score" and metric == "perplexity") for skill in skills
             for kind in ("score", "ratio")}
            | {"train/loss": 1.0 / index, "heldout/retention_loss": 0.1 * number, "train/grad_norm": 1.0 + number}
            for index in range(1, 5)
        ]  # fmt: skip
        sweep.add(setting(number), validations, logged=False)
    assert says in self_contained(sweep.page()).text


def test_population_based_training_shows_its_last_settings(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path, config_of(scheduler="pbt"))
    for number in range(4):
        sweep.add(setting(number), rising(0.1 * number, 0.99), logged=False)
    sweep.folder.trial(3).begin({"craft.lambda_lr": 0.777, "craft.epsilon_schedule": "constant"})
    page = self_contained(sweep.page())
    assert "0.777" in page.text
    assert "changed settings during training" in page.text


def test_many_trials_and_long_logs_stay_small(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path, config_of(scheduler="none"))
    for number in range(80):
        sweep.add(setting(number % 17), rising(0.004 * number, 0.9 + 0.001 * (number % 100)), logged=False)
    write_log(sweep.folder.trial(79).run(0), 20_000)
    text = sweep.page()
    self_contained(text)
    assert len(text) < 1_500_000


def test_an_export_has_every_figure_of_the_page_and_a_row_for_each_trial(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path)
    for number in range(5):
        sweep.add(setting(number), rising(0.1 * number, 0.93 + 0.01 * number))
    sweep.add(setting(5), rising(0.3, 0.9, count=2), "stopped")
    sweep.add({"craft.lambda_lr": 9.0}, [], "failed", 'a "reason", with a comma')
    page = sweep.page()
    export(sweep.folder.path, tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "index.json").read_text())["figures"]
    assert page.count('<svg role="img"') == len(figures) > 8
    assert len(list((tmp_path / "out" / "figures").glob("*.pdf"))) == len(figures)
    with (tmp_path / "out" / "tables" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["trial"], row["feasible"], row["new/score"]) for row in rows[:2]] == [
        ("1", "4", "true", "0.4"), ("2", "3", "true", "0.30000000000000004"),
    ]  # fmt: skip
    assert [(row["status"], row["reason"], row["step"]) for row in rows[-2:]] == [
        ("stopped", "", "50"), ("failed", 'a "reason", with a comma', ""),
    ]  # fmt: skip
    assert rows[0]["craft.lambda_lr"] == str(setting(4)["craft.lambda_lr"])
    text = (tmp_path / "out" / "tables" / "trials.tex").read_text()
    assert r"old/ratio $\geq$ 95.0 \%" in text
    assert text.count(r"\\") == 8
    with pytest.raises(ConfigError, match="has no trial yet"):
        export(MadeUp(tmp_path / "empty").folder.path, tmp_path / "none")
