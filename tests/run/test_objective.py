"""A setting within the bounds beats every one that is not, whatever its metric; and over seeds the confidence bound of
the mean must be within the bounds."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from craft_ray.config import Experiment, ObjectiveConfig, parse_config
from craft_ray.errors import ConfigError, DataError
from craft_ray.run.objective import Verdict, judge, means, objective_of, parse_bound

CASES = 3000


def objective(direction: str = "maximize", confidence: float = 0.95, **bounds: str) -> ObjectiveConfig:
    subject = {key.replace("_", "/", 1): bound for key, bound in bounds.items()}
    return ObjectiveConfig.model_validate(
        {direction: "new/score", "subject_to": subject or {"old/ratio": ">= 0.95"}, "confidence": confidence}
    )


def verdict(asked: ObjectiveConfig, new: float, old: float) -> Verdict:
    return judge(asked, [{"new/score": new, "old/ratio": old, "heldout/violation": old}])


def experiment(goal: dict[str, Any] | None, **changes: Any) -> Experiment:
    """Both skills are measured, the old one by its perplexity."""
    tree: dict[str, Any] = {
        "model": {"path": "org/model"},
        "task": {"path": "org/data"},
        "train": {"steps": 4},
        "craft": {"anchor_cache_dir": "anchors"},
        "validation": {
            "old": {"data": {"path": "org/old"}, "metric": "perplexity"},
            "new": {"data": {"path": "org/new"}},
        },
        "objective": goal,
    }
    return parse_config(tree, "test").changed(changes)


def sizes(rng: random.Random) -> float:
    """Numbers of every size and both signs."""
    return rng.choice(
        [0.0, 1.0, -1.0, 1e300, -1e300, 1e-300, rng.uniform(-2, 2), rng.gauss(0, 1) * 10 ** rng.uniform(-9, 18)]
    )


# --- one number that orders settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("bound", [">= 0.95", "<= 0.95", ">= -3", "<= 0", ">= 0"])
def test_whatever_is_within_the_bounds_is_above_whatever_is_not(direction: str, bound: str) -> None:
    rng = random.Random(0)
    asked = objective(direction, old_ratio=bound)
    least, limit = parse_bound(bound)
    sides: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(CASES):
        new, old = sizes(rng), sizes(rng)
        found = verdict(asked, new, old)
        kept = old >= limit if least else old <= limit
        assert found.feasible is kept
        assert math.isfinite(found.score)
        assert found.violation == pytest.approx(0 if kept else abs(old - limit) / (abs(limit) or 1))
        assert found.value == new
        sides[kept].append(found.score)
    assert len(sides[True]) > 100
    assert len(sides[False]) > 100
    assert min(sides[True]) >= 0 > max(sides[False])
    assert max(sides[True]) <= 1


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_among_those_within_the_bounds_the_metric_decides(direction: str, sign: int) -> None:
    rng = random.Random(1)
    asked = objective(direction)
    for _ in range(CASES):
        first, second = sizes(rng), sizes(rng)
        better, worse = (first, second) if sign * first > sign * second else (second, first)
        high, low = verdict(asked, better, 0.95).score, verdict(asked, worse, 1.5).score
        assert high >= low
        if abs(better) < 1e4 and abs(worse) < 1e4 and abs(better - worse) > 1e-6:
            assert high > low


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_among_those_outside_the_bounds_the_least_violating_is_first(direction: str) -> None:
    rng = random.Random(2)
    asked = objective(direction)
    for _ in range(CASES):
        less, more = sorted([rng.uniform(1e-9, 1e6), rng.uniform(1e-9, 1e6)])
        near, far = verdict(asked, sizes(rng), 0.95 - less), verdict(asked, sizes(rng), 0.95 - more)
        assert near.score >= far.score
        assert near.violation == pytest.approx(less / 0.95, rel=1e-6, abs=1e-15)


def test_known_scores() -> None:
    assert verdict(objective("maximize"), 0.0, 1.0).score == 0.5
    assert verdict(objective("maximize"), 1.0, 1.0).score == 0.75
    assert verdict(objective("minimize"), 1.0, 1.0).score == 0.25
    assert verdict(objective("maximize"), 1.0, 0.76).score == pytest.approx(-0.2)


def test_violations_are_relative_to_their_bounds_and_add_up() -> None:
    asked = objective(old_ratio=">= 0.8", heldout_violation="<= 0", train_loss="<= 2", new_score=">= 0.1")
    found = judge(asked, [{"new/score": 0.5, "old/ratio": 0.6, "heldout/violation": 0.25, "train/loss": 3.0}])
    expected = {"old/ratio": 0.25, "heldout/violation": 0.25, "train/loss": 0.5, "new/score": 0.0}
    assert found.violations == pytest.approx(expected)
    assert found.score == pytest.approx(-1.0)
    assert not found.feasible


def test_exactly_at_the_bound_is_kept_and_the_next_number_is_not() -> None:
    for bound, outside in ((">= 0.95", -math.inf), ("<= 0.95", math.inf)):
        asked = objective(old_ratio=bound)
        assert verdict(asked, 0.0, 0.95).feasible
        assert not verdict(asked, 1e9, math.nextafter(0.95, outside)).feasible
    zero = objective(heldout_violation="<= 0")
    assert verdict(zero, 0.0, 0.0).feasible
    assert verdict(zero, 0.0, 0.25).violation == 0.25


def test_without_bounds_the_metric_alone_decides() -> None:
    asked = ObjectiveConfig(minimize="train/loss")
    low, high = (judge(asked, [{"train/loss": loss}]) for loss in (0.5, 0.75))
    assert low.feasible
    assert low.score > high.score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (">= 0.95", (True, 0.95)),
        ("<=0.05", (False, 0.05)),
        ("  >=  1 ", (True, 1.0)),
        ("<= -1.5e-3", (False, -0.0015)),
        (">= +.5", (True, 0.5)),
        (">= 1e3", (True, 1000.0)),
    ],
)
def test_a_bound_is_read(text: str, expected: tuple[bool, float]) -> None:
    assert parse_bound(text) == expected
    ObjectiveConfig(maximize="new/score", subject_to={"old/ratio": text})


@pytest.mark.parametrize("text", ["0.95", "> 0.95", "== 1", ">= ", ">= nan", ">= inf", ">= 95%", ">= 0.9 and <= 1", ""])
def test_an_invalid_bound_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"objective.subject_to.old/ratio: .* is not a bound: write '>= 0.95'"):
        experiment({"maximize": "new/score", "subject_to": {"old/ratio": text}})


# --- several seeds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "mean"), [(">= 0.95", 0.96), ("<= 0.95", 0.94)])
def test_a_mean_within_the_bound_is_not_enough_where_seeds_disagree(bound: str, mean: float) -> None:
    def of(spread: float) -> Verdict:
        runs = [{"new/score": 0.4, "old/ratio": mean - spread}, {"new/score": 0.6, "old/ratio": mean + spread}]
        return judge(objective(old_ratio=bound), runs)

    # With two values t s / sqrt(2) is 6.314 times the spread.
    assert of(0.0).feasible
    assert of(0.0015).feasible
    assert not of(0.0017).feasible
    assert of(0.0017).violation == pytest.approx((6.3138 * 0.0017 - 0.01) / 0.95, rel=1e-3)
    assert of(0.0).value == 0.5, "the metric itself is a plain mean"


# --- objectives that cannot be searched for -----------------------------------------------------------------------

BOUNDED = {"maximize": "new/score", "subject_to": {"old/ratio": ">= 0.95"}}


@pytest.mark.parametrize(
    "goal",
    [
        BOUNDED,
        {"maximize": "old/ratio"},
        {"minimize": "old/score"},
        {"minimize": "train/loss", "subject_to": {"heldout/violation": "<= 0", "old/score": "<= 12"}},
        {"minimize": "heldout/retention_loss", "subject_to": {"new/score": ">= 0.5"}},
        {"minimize": "perf/step_s", "subject_to": {"craft/conflict": "<= 0.5"}},
    ],
)
def test_what_is_measured_can_be_searched_for(goal: dict[str, Any]) -> None:
    config = experiment(goal)
    assert objective_of(config) is config.objective


@pytest.mark.parametrize(
    ("goal", "changes", "reason"),
    [
        (None, {}, r"has no objective: add e.g. 'objective: \{maximize: new/score"),
        ({"maximize": "new/scor"}, {}, r"'new/scor' is not measured: choose among old/score, .*heldout/.*train/loss"),
        ({"maximize": ""}, {}, r"'' is not measured"),
        ({"minimize": "step"}, {}, r"'step' is not measured"),
        ({"maximize": "new/score", "subject_to": {"old/rato": ">= 1"}}, {}, r"'old/rato' is not measured"),
        (BOUNDED, {"validation.old": None}, r"score of the old skill needs data: add validation.old"),
        (BOUNDED, {"validation.new": None}, r"score of the new skill needs data: add validation.new"),
        ({"maximize": "old/score"}, {}, r"old/score is a perplexity, .*minimize it.*or use old/ratio"),
        ({"maximize": "new/score", "subject_to": {"old/score": ">= 9"}}, {}, r"old/score is a perplexity"),
        ({"minimize": "new/score"}, {}, r"higher new/score is better: maximize it"),
        ({"minimize": "old/ratio"}, {}, r"higher old/ratio is better: maximize it"),
        ({"maximize": "train/loss"}, {}, r"lower train/loss is better: minimize it"),
        (
            {"maximize": "new/score", "subject_to": {"old/ratio": "<= 0.95"}},
            {},
            r"higher old/ratio is better: .* bound it with >=",
        ),
        (
            {"maximize": "new/score", "subject_to": {"heldout/violation": ">= 0"}},
            {},
            r"lower heldout/violation is better: .*with <=",
        ),
        (
            {"minimize": "heldout/violation"},
            {"craft.anchor_cache_dir": None, "craft.enabled": False},
            r"heldout/violation needs anchors: set craft.anchor_cache_dir",
        ),
    ],
)
def test_what_cannot_be_searched_for_is_refused(
    goal: dict[str, Any] | None, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        objective_of(experiment(goal, **changes))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("goal", [{}, {"maximize": "new/score", "minimize": "train/loss"}])
def test_an_objective_has_one_metric(goal: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="specify one metric, either under maximize or under minimize"):
        experiment(goal)


@pytest.mark.parametrize("run", [{"new/score": 1.0}, {"new/score": 1.0, "old/ratio": None}])
def test_a_metric_without_a_value_is_reported(run: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"objective: old/ratio has no value \(the teacher's own score is 0\)"):
        judge(objective(), [{"new/score": 1.0, "old/ratio": 1.0}, run])
    with pytest.raises(DataError, match=r"objective: craft/grad_cos has no value \(it was not measured"):
        judge(ObjectiveConfig(maximize="craft/grad_cos"), [run])


def test_means_leave_out_the_steps_that_have_no_value() -> None:
    record: dict[str, Any] = {
        "step": 1, "train/loss": 1.0, "train/grad_norm": 2.0, "train/lr": 0.5, "craft/retention_loss": None,
        "craft/lambda": 1.0, "craft/epsilon": 0.5, "craft/grad_dot": None, "craft/grad_cos": None,
        "craft/conflict": None, "perf/step_s": 0.25, "perf/data_s": 0.0,
    }  # fmt: skip
    other = record | {"step": 2, "train/loss": 3.0, "craft/grad_cos": -0.5, "craft/conflict": True}
    found = means([record, other])
    assert found["train/loss"] == 2.0
    assert found["craft/grad_cos"] == -0.5
    assert found["craft/conflict"] == 1.0
    assert "craft/grad_dot" not in found
    assert "step" not in found
    assert means([]) == {}


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["new/score", "old/ratio"])
def test_a_metric_that_is_not_finite_gives_no_verdict(metric: str, wrong: float) -> None:
    measured = {"new/score": 0.9, "old/ratio": 1.0, metric: wrong}
    with pytest.raises(DataError, match=rf"{metric} is (nan|inf): it must be finite"):
        judge(objective(old_ratio=">= 0.8"), [measured])
