"""What Prometheus reads from the node's port equals the run's log, and it disappears when the run ends."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from craft_pipelines.anchors import build
from craft_pipelines.build_progress import BuildProgress
from craft_pipelines.ray_metrics import COUNTERS, GAUGES, BuildMetrics, RayMetrics, gauge_values, run_tag
from craft_pipelines.train import plan_run, train_run

from craft_ray.pace import unreported
from craft_ray.run.observers import NullObserver
from tests.support.experiments import ANSWERED, Digits

GRAFANA = Path(__file__).parents[2] / "cluster" / "grafana"
LABELS = {"run", "arm", "skill", "cache"}

Port = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""The metrics on a port: (name, our tags) -> value."""


def record(step: int, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("craft/retention_loss", "craft/lambda", "craft/epsilon", "craft/conflict", "train/grad_norm", "train/lr")
    )
    return {"step": step, "train/loss": 1.0, "perf/step_s": 1.0, "perf/data_s": 0.0, **empty, **values}


def test_gauges_follow_the_last_records_of_a_run() -> None:
    first = {"craft/retention_loss": 0.3, "craft/epsilon": 0.1, "craft/conflict": True, "perf/step_s": 3.0}
    second = {"craft/retention_loss": 0.2, "craft/epsilon": 0.1, "craft/conflict": False}
    third = {"train/loss": 0.5, "craft/lambda": 2.0, "craft/epsilon": 0.05}  # no retention at this step
    values = gauge_values([record(7, **first), record(8, **second), record(9, **third)])
    assert values["craft_step"] == 9
    assert values["craft_task_loss"] == 0.5
    assert values["craft_retention_loss"] == 0.2
    assert values["craft_violation"] == pytest.approx(1.0)
    assert values["craft_conflict_rate"] == 0.5
    assert (values["craft_lambda"], values["craft_epsilon"]) == (2.0, 0.05)
    assert values["craft_step_seconds"] == pytest.approx(5 / 3)


def test_a_baseline_has_no_budget() -> None:
    values = gauge_values([record(1)])
    assert "craft_violation" not in values
    assert values["craft_lambda"] is None
    assert values["craft_step"] == 1


def test_the_run_tag_of_a_trial_includes_its_sweep() -> None:
    assert run_tag(Path("/x/runs/run-hidden-seed0")) == "run-hidden-seed0"
    assert run_tag(Path("/x/my-sweep/trials/0003/seed1")) == "my-sweep/0003/seed1"


def test_without_ray_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    class Recording(NullObserver):
        def steps(self, records: Any) -> None:
            counts.append(len(records))

    monkeypatch.setattr("craft_pipelines.ray_metrics.ray.is_initialized", lambda: False)
    monkeypatch.setattr("craft_pipelines.ray_metrics.Gauge", None)
    before = threading.active_count()
    with RayMetrics(Path("/x/run"), "hidden", 10, Recording(), enabled=True) as metrics:
        metrics.steps([record(1), record(2)])
        metrics.validated({"step": 2, "old/score": 0.5})
        assert threading.active_count() == before
    assert counts == [2]


def skilled(step: int, **values: float) -> dict[str, Any]:
    """A step of a run with the skills `drawer` and `door`: at a retention step it has their losses and multipliers."""
    own = {f"skills/{name}/{kind}": None for name in ("drawer", "door") for kind in ("retention_loss", "lambda")}
    own |= {"skills/drawer/epsilon": 0.05, "skills/door/epsilon": 0.02}
    return record(step, **{**own, **{key.replace("__", "/"): value for key, value in values.items()}})


def test_several_skills_are_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between two retention steps, where the values of the last one remain."""
    sent: dict[tuple[str, str | None], float] = {}

    class Recorded:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.tags = name, set(tag_keys)

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == self.tags, "Ray refuses a value without one of its tags"
            sent[self.name, tags.get("skill")] = value

    monkeypatch.setattr("craft_pipelines.ray_metrics.ray.is_initialized", lambda: True)
    monkeypatch.setattr("craft_pipelines.ray_metrics._gauge", lambda name: Recorded(name, *GAUGES[name]))
    monkeypatch.setattr(RayMetrics, "count", lambda *_: None)
    measured = {
        "craft/retention_loss": 0.04,
        "skills__drawer__retention_loss": 0.1,
        "skills__door__retention_loss": 0.01,
    }
    measured |= {"skills__drawer__lambda": 3.0, "skills__door__lambda": 0.5}
    scores = {"drawer": (0.9, 0.06, 0.2), "door": (0.8, 0.01, 0.0)}
    validation = {"step": 3, "old/score": 0.8, "heldout/retention_loss": 0.06, "heldout/violation": 0.2}
    for name, found in scores.items():
        kinds = ("score", "retention_loss", "violation")
        validation |= {f"skills/{name}/{kind}": value for kind, value in zip(kinds, found, strict=True)}
    with RayMetrics(Path("/x/run"), "hidden", 10, NullObserver(), enabled=True) as metrics:
        metrics.steps([skilled(1, **measured), skilled(2)])
        metrics.steps([skilled(3)])
        metrics.validated(validation)
    assert {skill: sent["craft_skill_lambda", skill] for skill in scores} == {"drawer": 3.0, "door": 0.5}
    assert {skill: sent["craft_skill_retention_loss", skill] for skill in scores} == {"drawer": 0.1, "door": 0.01}
    assert {skill: sent["craft_skill_epsilon", skill] for skill in scores} == {"drawer": 0.05, "door": 0.02}
    for place, gauge in enumerate(("validation_score", "heldout_retention_loss", "heldout_violation")):
        own = {skill: sent[f"craft_{gauge}", skill] for skill in scores}
        assert own == {skill: found[place] for skill, found in scores.items()}
    assert sent["craft_heldout_violation", "old"] == 0.2
    assert sent["craft_validation_score", "old"] == 0.8


def test_an_anchor_counts_once_as_soon_as_a_teacher_has_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(BuildMetrics, "count", lambda *what: counted.append(what[2]))
    with BuildMetrics(Path("/x/anchors"), 100, 20) as metrics:
        progress = BuildProgress(100, 20, unreported, metrics.ran)
        for name, rows, whole in (("a", 5.0, 5), ("a", 12.5, 12), ("b/8", 2.0, 14)):
            progress.passed(name, rows)
            assert sum(counted) == whole
        progress.passed("a", 3.0)  # its teacher was lost, and another one begins again
        progress.passed("a", 14.0)
        assert sum(counted) == 16
        progress.wrote("a", 30)
        progress.passed("a", 29.0)
        assert sum(counted) == 32
        progress.wrote("b", 50)
    assert sum(counted) == 80, "the rows of this build"


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def test_the_dashboard_queries_what_is_exported() -> None:
    dashboard = json.loads((GRAFANA / "craft.json").read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    exported = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}
    tags = {f"ray_{name}": set(tags) for name, (_, tags) in GAUGES.items()}
    tags |= {f"ray_{name}_total": set(tags) for name, (_, tags) in COUNTERS.items()}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    ids, places, shown = [panel["id"] for panel in panels], [], set()
    assert len(set(ids)) == len(ids)
    for panel in panels:
        assert {"title", "type", "datasource", "gridPos", "targets", "fieldConfig", "options"} <= panel.keys()
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        places.append((place["x"], place["y"]))
        for target in panel["targets"]:
            assert {"expr", "refId", "legendFormat"} <= target.keys()
            names = set(re.findall(r"\bray_\w+", target["expr"]))
            assert names, target["expr"]
            assert names <= exported, target["expr"]
            shown |= names
            for name, chosen in re.findall(r"\b(ray_\w+)\{([^}]*)\}", target["expr"]):
                assert set(re.findall(r"(\w+)\s*=~?", chosen)) <= tags[name], target["expr"]
            for kept in re.findall(r"by \(([^)]*)\)", target["expr"]):
                asked = {tag.strip() for tag in kept.split(",")}
                assert all(asked <= tags[name] for name in names), target["expr"]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= LABELS
            assert target["expr"].count("(") == target["expr"].count(")")
    assert len(set(places)) == len(places)
    assert shown == exported, "every metric is on the dashboard"
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([expressions(panel) for panel in panels])))
    assert used <= variables.keys() | {"__rate_interval"}


def test_every_metric_is_explained() -> None:
    document = (GRAFANA.parent.parent / "docs" / "observability.md").read_text()
    for metrics, suffix in ((GAUGES, ""), (COUNTERS, "_total")):
        for name, (what, tags) in metrics.items():
            assert f"| `{name}{suffix}` | {what} | {', '.join(tags)} |" in document


def exported(port: str) -> Port:
    """Our metrics on a port."""
    with urllib.request.urlopen(f"http://{port}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    found: Port = {}
    for line in lines:
        if match := re.fullmatch(r"ray_(craft_\w+)\{(.*)\} (\S+)", line):
            tags = frozenset(pair for pair in re.findall(r'(\w+)="([^"]*)"', match[2]) if pair[0] in LABELS)
            found[match[1], tags] = float(match[3])
    return found


@contextmanager
def watched(port: str) -> Iterator[Port]:
    """The last value of each metric on the port while the body ran."""
    seen: Port = {}
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(0.2):
            seen.update(exported(port))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def wait_until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The Prometheus port of a cluster on this machine that exports every two seconds instead of ten."""
    ray.shutdown()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("craft_pipelines.ray_metrics.REFRESH_S", 1.0)
    interval = {"metrics_report_interval_ms": 2000}
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", _system_config=interval)
    (node,) = ray.nodes()
    yield f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prometheus_reads_what_the_run_logged(digits: Digits, tmp_path: Path, port: str) -> None:
    def validation_data(skill: str) -> dict[str, Any]:
        data = {"path": str(digits.data / f"{skill}_val.parquet"), "columns": ANSWERED, "limit": 8}
        return {"data": data, "max_new_tokens": 1}

    changes = {
        "workers.num_workers": 1, "train.log_every": 3, "train.checkpoint_every": 3, "craft.retention_freq": 2,
        "validation": {"every": 3, "old": validation_data("old"), "new": validation_data("new")},
    }  # fmt: skip
    config = digits.experiment(tmp_path, changes)
    run = plan_run(config)
    with watched(port) as seen:
        build(config, say=lambda _: None)
        wait_until(lambda: seen.get(("craft_anchors_done", frozenset({("cache", "anchors")}))) == 48, 60)
        train_run(run)
        of_run = frozenset({("run", run.folder.path.name), ("arm", "hidden")})
        wait_until(lambda: seen.get(("craft_step", of_run)) == 6, 60)
        time.sleep(0.5)  # one more scrape: what is exported together is read together

    def value(name: str, **tags: str) -> float:
        return seen[name, of_run | set(tags.items())]

    records, (*_, look_at_end) = run.folder.read_metrics(), run.folder.read_validation()
    last = records[-1]
    assert last["craft/retention_loss"] is None, "the last step has none, so the value of the step before remains"
    expected = gauge_values(records[3:])
    assert expected["craft_retention_loss"] == records[4]["craft/retention_loss"]
    for name, number in expected.items():
        assert value(name) == number, name
    assert value("craft_lambda") == last["craft/lambda"]
    assert value("craft_task_loss") == last["train/loss"]
    assert value("craft_steps_planned") == 6
    assert value("craft_validation_score", skill="new") == look_at_end["new/score"]
    assert value("craft_heldout_retention_loss", skill="old") == look_at_end["heldout/retention_loss"]
    assert seen["craft_steps_total", frozenset({("arm", "hidden")})] == 6
    of_cache = frozenset({("cache", "anchors")})
    assert seen["craft_anchors_total", of_cache] == seen["craft_anchors_planned", of_cache] == 48
    assert seen["craft_anchors_per_second", of_cache] > 0

    def left() -> set[str]:
        return {name for name, _ in exported(port)} - {f"{name}_total" for name in COUNTERS}

    end = time.monotonic() + 60
    while left() and time.monotonic() < end:
        time.sleep(0.5)
    assert not left(), "gauges disappear with their run"
