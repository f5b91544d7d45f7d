"""What keeping a part of the old skill costs, from made-up validations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from craft_ray.config import parse_config
from craft_ray.errors import ConfigError
from craft_ray.report.price import Point, cheapest, cost_of_a_percent, points_of, price_lines, runs_at
from craft_ray.run.folder import RunFolder
from craft_ray.storage.paths import ObjectPath, copy_tree

Row = tuple[int, float | None, float]
"""Step, part that was kept, new score."""


def run_at(path: Path, rows: list[Row], metric: str = "exact_match", data: str = "val.jsonl") -> Path:
    scored = {"metric": metric, "data": {"path": data, "columns": {"response": "answer"}}}
    tree: dict[str, Any] = {
        "model": {"path": "org/model"},
        "task": {"path": "new.jsonl"},
        "train": {"steps": 9},
        "validation": {"every": 3, "old": scored, "new": scored},
    }
    folder = RunFolder(path)
    folder.begin(parse_config(tree, "test"), ["test"])
    for step, kept, new in rows:
        bound = None if kept is None else kept - 0.02
        folder.append_validation({"step": step, "old/ratio": kept, "old/bound": bound, "new/score": new})
    return path


def test_the_cheapest_point_keeps_enough_and_has_the_best_new_score(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run", [(3, 0.99, 0.4), (6, 0.96, 0.7), (9, 0.93, 0.8)])
    sweep = tmp_path / "sweep"
    run_at(sweep / "trials" / "0" / "seed0", [(9, 0.955, 0.75)])
    run_at(sweep / "trials" / "1" / "seed0", [(9, 0.5, 0.9)])
    points, metric = points_of(runs_at([run, sweep]))
    assert len(points) == 5
    found = [cheapest(points, metric, keep) for keep in (0.9, 0.95, 0.99, 0.995)]
    assert [point and point.new for point in found] == [0.8, 0.75, 0.4, None]
    (run / "checkpoints" / "step_00000009").mkdir(parents=True)
    lines = list(price_lines(points, metric, [0.995, 0.9, 0.95]))
    assert lines[0] == "best new exact_match of 5 validations: 0.900, at 50.0% kept (1/seed0, step 9)"
    assert lines[1] == (
        "keep 90%: new exact_match 0.800, 88.9% of the best; 93.0% kept, at least 91.0% (run, step 9; its checkpoint "
        "is there)"
    )
    assert lines[2] == "  from 90% to 95%: 1.00 points of new exact_match per percent of old"  # 5 points for 5 percent
    assert "(0/seed0, step 9; its checkpoint was not kept)" in lines[3]
    assert lines[4:] == ["keep 99.5%: no validation kept so much; the most is 99.0% at new 0.400"]


def test_a_sweep_in_an_object_store_has_its_trials(tmp_path: Path, object_store: ObjectPath) -> None:
    run_at(tmp_path / "sweep" / "trials" / "0" / "seed0", [(9, 0.955, 0.75)])
    copy_tree(tmp_path / "sweep", object_store / "priced")
    (point,), _ = points_of(runs_at([object_store / "priced"]))
    assert (point.kept, point.new) == (0.955, 0.75)


def kept(points: list[Point], metric: str, parts: Sequence[float]) -> list[tuple[float, Point]]:
    """The parts that a validation kept, each with the best one."""
    return [(part, point) for part in parts if (point := cheapest(points, metric, part)) is not None]


def test_a_percent_costs_what_the_best_new_scores_differ_by(tmp_path: Path) -> None:
    """Between targets, not between what was kept: the best of 90 % may have kept 93 %."""
    points, metric = points_of(runs_at([run_at(tmp_path / "run", [(3, 0.99, 0.4), (6, 0.96, 0.7), (9, 0.93, 0.8)])]))
    found = kept(points, metric, (0.8, 0.9, 0.95, 0.99))
    costs = [cost_of_a_percent(lower, upper, metric) for lower, upper in pairwise(found)]
    # The same validation keeps 80 and 90 %; 10 points are 5 percent apart, 30 points 4 percent.
    assert costs == pytest.approx([0.0, 2.0, 7.5])


@pytest.mark.parametrize("metric", ["exact_match", "perplexity"])
def test_a_percent_never_costs_less_than_nothing_and_the_costs_add_up(metric: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows: list[Row] = [(step, draw.uniform(0.5, 1.0), draw.uniform(0.1, 1.0)) for step in range(1, 40)]
    points, metric = points_of(runs_at([run_at(tmp_path / "run", rows, metric)]))
    found = kept(points, metric, (0.5, 0.6, 0.75, 0.8, 0.9, 0.93))
    assert len(found) > 3
    costs = [100 * (b[0] - a[0]) * cost_of_a_percent(a, b, metric) for a, b in pairwise(found)]
    assert min(costs) >= 0
    unit = 1 if metric == "perplexity" else 100
    assert sum(costs) == pytest.approx(unit * abs(found[0][1].new - found[-1][1].new))


def test_a_lower_perplexity_is_better(tmp_path: Path) -> None:
    points, metric = points_of(runs_at([run_at(tmp_path / "run", [(3, 0.95, 8.0), (6, 0.92, 5.0)], "perplexity")]))
    chosen = cheapest(points, metric, 0.9)
    assert isinstance(chosen, Point)
    assert chosen.new == 5.0
    assert "62.5% of the best" in list(price_lines(points, metric, [0.95]))[1]
    between = list(price_lines(points, metric, [0.92, 0.95]))[2]
    assert between == "  from 92% to 95%: 1 of new perplexity per percent of old"


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one = run_at(tmp_path / "one", [(3, 0.9, 0.5)])
    other = run_at(tmp_path / "other", [(3, 0.9, 0.5)], data="others.jsonl")
    with pytest.raises(ConfigError, match="validated on different data"):
        points_of(runs_at([one, other]))
    with pytest.raises(ConfigError, match="no validation of these runs scored both"):
        points_of(runs_at([run_at(tmp_path / "none", [(3, None, 0.5)])]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty is neither a run nor a sweep"):
        runs_at([tmp_path / "empty"])
