"""Trials in this process: their reports, interrupted anywhere and resumed to the same numbers, and what is left."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from craft_pipelines.anchors import build
from craft_pipelines.sweep.driver import plan_sweep, resume_sweep
from craft_pipelines.sweep.runs import RunTrial, in_process
from craft_pipelines.sweep.tracking import SweepTracking
from craft_pipelines.sweep.trial import TRIAL, CraftTrial, reports

from craft_ray.config import Experiment, SampleEvalSet, load_config
from craft_ray.errors import ConfigError, CraftError
from craft_ray.run.checkpoint import checkpoint_step
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import Record
from craft_ray.run.objective import judge
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train, training
from craft_ray.statistics import mean_bound
from craft_ray.storage.last import last_checkpoint
from craft_ray.sweep.results import read_results, write_results
from craft_ray.sweep.space import Params, parse_space
from craft_ray.sweep.trials import Plan, Report, SweepFolder, TrialFolder, seeds, trial_config
from craft_ray.workers import OneWorker
from tests.support.experiments import Digits
from tests.support.sweeps import BOUNDS, snapshot, untimed, validated

KNOBS: dict[str, Any] = {
    "craft.lambda_lr": {"loguniform": [0.02, 0.5]},
    "craft.epsilon_start": {"loguniform": [0.001, 0.3]},
}
PARAMS: Params = {"craft.lambda_lr": 0.25, "craft.epsilon_start": 0.002}


@pytest.fixture(scope="module")
def base(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A config with an anchor cache, validation and evaluation data, and an objective."""
    folder = tmp_path_factory.mktemp("sweep")
    changes = {**validated(digits.data), **digits.scored()}
    config = digits.experiment(folder, changes)
    build(config, say=lambda _: None)
    return config


def start_sweep(config: Experiment, path: Path, params: Params | None = None) -> tuple[SweepFolder, Plan, TrialFolder]:
    """A sweep with one trial that has not run yet."""
    folder, plan = SweepFolder(path), Plan(config, parse_space(KNOBS, "space.yaml"), ["test"])
    folder.begin(plan)
    trial = folder.trial(0)
    trial.begin(params or PARAMS)
    return folder, plan, trial


@pytest.fixture(scope="module")
def whole(base: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepFolder, list[Report]]:
    """A sweep whose one trial ran undisturbed, and its reports. Do not write into it."""
    folder, plan, trial = start_sweep(base, tmp_path_factory.mktemp("whole") / "sweep")
    assert base.craft.anchor_cache_dir is not None
    before = snapshot(Path(base.craft.anchor_cache_dir))
    found = list(reports(trial, plan, in_process))
    assert snapshot(Path(base.craft.anchor_cache_dir)) == before, "nothing is written where the anchors are"
    return folder, found


# --- a trial ------------------------------------------------------------------------------------------------------


def test_a_trial_reports_at_each_validation(whole: tuple[SweepFolder, list[Report]]) -> None:
    folder, found = whole
    trial = folder.trial(0)
    assert [(report["step"], report["done"], report["seeds"]) for report in found] == [
        (2, False, 1), (4, False, 1), (6, True, 1),
    ]  # fmt: skip
    assert trial.outcome().status == "finished"
    assert [report | {"done": report["step"] == 6} for report in trial.reports()] == found
    run = trial.run(0)
    metrics, validations = run.read_metrics(), run.read_validation()
    for report, record in zip(found, validations, strict=True):
        assert report["params"] == PARAMS
        expected = {key: value for key, value in record.items() if key != "step" and value is not None}
        assert {key: report["metrics"][key] for key in expected} == expected
        since = [step for step in metrics if record["step"] - 2 < step["step"] <= record["step"]]
        for key in ("train/loss", "craft/lambda", "train/lr"):
            assert report["metrics"][key] == pytest.approx(statistics.fmean(step[key] for step in since))
        assert report["value"] == record["new/ratio"]
        assert report["feasible"] is True
    assert [report["seconds"] for report in found] == sorted(report["seconds"] for report in found)


def test_a_trial_saves_nothing_is_scored_on_validation_data_alone_and_copies_no_anchors(
    base: Experiment, whole: tuple[SweepFolder, list[Report]]
) -> None:
    folder, _ = whole
    run = folder.trial(0).run(0)
    assert not run.checkpoints.exists()
    assert not (run.path / "evaluation").exists()
    result = run.finished()
    assert result is not None
    for skill in ("old", "new"):
        assert result[skill] == {"before": None, "after": None}
    assert run.config().evaluation.old is None
    assert run.config().evaluation.new is None
    assert run.config().craft.anchor_cache_dir == base.craft.anchor_cache_dir
    assert any((run.path / "tensorboard").iterdir())
    large = [path for path in folder.path.rglob("*") if path.is_file() and path.stat().st_size > 50_000]
    assert not large, "neither weights nor anchors are in a sweep's folder"


def test_a_trial_that_has_ended_is_read_from_its_folder(whole: tuple[SweepFolder, list[Report]]) -> None:
    folder, found = whole
    before = snapshot(folder.path)
    again = list(reports(folder.trial(0), folder.load(), in_process))
    assert [{"done": False, **report} for report in again] == found
    assert [report["step"] for report in reports(folder.trial(0), folder.load(), in_process, after=2)] == [4, 6]
    assert snapshot(folder.path) == before


@pytest.mark.parametrize(("checkpoint_every", "validations"), [(0, 1), (2, 1), (2, 2), (3, 2)])
def test_an_interrupted_trial_resumes_to_the_same_numbers(
    checkpoint_every: int, validations: int, base: Experiment, whole: tuple[SweepFolder, list[Report]], tmp_path: Path
) -> None:
    config = base.changed({"train.checkpoint_every": checkpoint_every})
    _, plan, trial = start_sweep(config, tmp_path / "sweep")
    with closing(reports(trial, plan, in_process)) as stream:
        first = [next(stream) for _ in range(validations)]
    assert trial.outcome().status == "open"
    assert trial.run(0).finished() is None
    kept = [path.name for path in trial.run(0).checkpoints.glob("step_*")]
    at = checkpoint_every and 2 * validations // checkpoint_every * checkpoint_every
    assert kept == ([f"step_{at:06d}"] if at else []), "saved only where the config asks for it"

    again = list(reports(trial, plan, in_process))
    assert [report["step"] for report in again] == [2, 4, 6]
    assert untimed(again) == untimed(whole[1])
    assert untimed(trial.reports()) == untimed(whole[1])
    if at:
        repeated = [{"done": False, **report} for report in again]
        assert repeated[: at // 2] == first[: at // 2], "what was reported is not measured again"
    assert trial.run(0).read_validation() == whole[0].trial(0).run(0).read_validation()
    assert [record["step"] for record in trial.run(0).read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert trial.outcome().status == "finished"
    assert not trial.run(0).checkpoints.exists()


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_a_trial_that_was_lost_after_its_last_validation_resumes(
    checkpoint_every: int, base: Experiment, whole: tuple[SweepFolder, list[Report]], tmp_path: Path
) -> None:
    config = base.changed({"train.checkpoint_every": checkpoint_every})
    _, plan, trial = start_sweep(config, tmp_path / "sweep")
    own = trial_config(config, PARAMS, trial, seed=0)
    trial.run(0).begin(own, ["test"])
    with closing(training(own, trial.run(0), OneWorker(), NullObserver())) as validations:
        assert [next(validations)["step"] for _ in range(3)] == [2, 4, 6]
    assert trial.run(0).finished() is None, "lost before it was concluded"
    found = list(reports(trial, plan, in_process))
    assert found[-1]["done"]
    assert untimed(found)[-1] == untimed(whole[1])[-1]
    assert trial.outcome().status == "finished"


def process(folder: SweepFolder, run_trial: RunTrial) -> CraftTrial:
    """The process in which Tune runs the first trial."""

    class Process(CraftTrial):
        def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
            super().setup(config, sweep=str(folder.path), run_trial=run_trial)

    folder.assign("default", 0)  # Tune's name for a trial that has no other
    return Process({TRIAL: 0})


def test_a_trial_that_runs_out_of_memory_reports_it_in_one_line(base: Experiment, tmp_path: Path) -> None:
    folder, _, trial = start_sweep(base.changed({"objective.subject_to": {}}), tmp_path / "sweep")

    def exhausted(config: Experiment, run: RunFolder) -> Generator[Record]:
        yield {"step": 2, "new/ratio": 0.5}
        torch.empty(2**60)

    crashing = process(folder, exhausted)
    assert crashing.step()["value"] == 0.5
    with pytest.raises(RuntimeError):
        crashing.step()
    reason = trial.read_error()
    assert reason is not None
    assert "allocate" in reason
    assert "\n" not in reason
    assert trial.outcome().status == "open", "the trial itself does not decide whether it is tried again"
    assert [report["step"] for report in trial.reports()] == [2]


class Lost(Exception):
    """The process is lost at this moment."""


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        *(((Run, "validate"), step) for step in (4, 6)),
        *(((TrialFolder, "add_report"), step) for step in (4, 6)),
        ((TrialFolder, "end"), 6),
    ],
)
def test_population_based_training_resumes_wherever_it_was_lost(
    moment: tuple[type, str], step: int, base: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the checkpoint and the validation, the validation and its report, the last report and the end."""
    folder, plan, trial = start_sweep(base.changed({"sweep.scheduler": "pbt"}), tmp_path / "sweep")
    original = getattr(*moment)

    def lost(self: Any, *arguments: Any) -> Any:
        checkpoint = last_checkpoint(trial.run(0).checkpoints)
        if checkpoint is not None and checkpoint_step(checkpoint) == step:
            raise Lost
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(*moment, lost)
        with pytest.raises(Lost):
            list(reports(trial, plan, in_process))

    resumed = process(folder, in_process)
    while not resumed.step()["done"]:
        pass
    assert [report["step"] for report in trial.reports()] == [2, 4, 6]
    assert trial.outcome().status == "finished"


def test_seeds_are_kept_apart_and_a_setting_is_their_mean(
    base: Experiment, whole: tuple[SweepFolder, list[Report]], tmp_path: Path
) -> None:
    bounds = {"heldout/retention_loss": "<= 1000", **BOUNDS}
    config = base.changed({"sweep.repeat": 2, "objective.subject_to": bounds})
    _, plan, trial = start_sweep(config, tmp_path / "sweep")
    with closing(reports(trial, plan, in_process)) as stream:
        assert [next(stream)["step"] for _ in range(3)] == [2, 4, 6]
    first = snapshot(trial.path / "seed0")
    assert trial.outcome().status == "open"
    assert not (trial.path / "seed1").exists()

    found = list(reports(trial, plan, in_process))
    assert snapshot(trial.path / "seed0") == first, "the completed seed is not run again"
    assert [(report["step"], report["seeds"], report["done"]) for report in found] == [
        (2, 1, False), (4, 1, False), (6, 1, False), (12, 2, True),
    ]  # fmt: skip
    assert [report["step"] for report in trial.reports()] == [2, 4, 6, 12]
    assert [report["metrics"]["train/loss"] for report in found[:3]] == [
        report["metrics"]["train/loss"] for report in whole[1]
    ]
    runs = [trial.run(seed) for seed in (0, 1)]
    assert [run.config().seed for run in runs] == [0, 1]
    assert runs[0].read_metrics()[1]["train/loss"] != runs[1].read_metrics()[1]["train/loss"]
    last = [run.read_validation()[-1] for run in runs]
    for key in ("new/score", "old/ratio", "heldout/retention_loss"):
        assert found[-1]["metrics"][key] == pytest.approx(statistics.mean(record[key] for record in last))

    losses = [record["heldout/retention_loss"] for record in last]
    bound = mean_bound(losses, 0.95, lower=False)
    assert bound > max(losses), "with two seeds the bound is far from the mean"
    for limit, kept in ((bound * 1.001, True), (bound * 0.999, False), (max(losses) * 1.001, False)):
        objective = {"maximize": "new/ratio", "subject_to": {"heldout/retention_loss": f"<= {limit}"}}
        judged = plan.config.changed({"objective": objective})
        (trial.path / "outcome.json").unlink()
        (trial.path / "reports.jsonl").unlink()
        again = list(reports(trial, Plan(judged, plan.space, plan.command), in_process))
        assert again[-1]["feasible"] is kept
    assert snapshot(trial.path / "seed0") == first


def test_the_teacher_is_scored_once_for_all_trials(base: Experiment, tmp_path: Path) -> None:
    config = base.changed({"train.steps": 2})
    folder, plan, trial = start_sweep(config, tmp_path / "sweep")
    list(reports(trial, plan, in_process))
    shared = {path.name: path.stat() for path in (folder.path / "trials").glob(".teacher-score-*.json")}
    assert len(shared) == 2, "one for each skill"

    # A second trial takes the score from the file instead of measuring it.
    for name in shared:
        path = folder.path / "trials" / name
        stored = json.loads(path.read_text())
        stored["score"]["value"] = 0.125
        path.write_text(json.dumps(stored))
    other = folder.trial(1)
    other.begin({**PARAMS, "craft.lambda_lr": 0.1})
    found = list(reports(other, plan, in_process))
    assert found[-1]["metrics"]["old/ratio"] == 0.125 / found[-1]["metrics"]["old/score"]
    assert {path.name for path in (folder.path / "trials").glob(".teacher-score-*.json")} == set(shared)


@pytest.mark.parametrize("metric", ["train/loss", "heldout/retention_loss"])
def test_a_sweep_needs_no_validation_data_for_metrics_that_are_measured_without_it(
    metric: str, base: Experiment, tmp_path: Path
) -> None:
    without = {"validation": {"old": None, "new": None, "every": 0}, "train.steps": 2}
    config = base.changed({**without, "objective": {"minimize": metric}})
    _, plan, trial = start_sweep(config, tmp_path / "sweep")
    (report,) = reports(trial, plan, in_process)
    assert report["done"]
    assert report["step"] == 2
    assert report["value"] == report["metrics"][metric]


def test_an_objective_without_a_value_fails_the_trial_with_its_reason(base: Experiment, tmp_path: Path) -> None:
    objective = {"maximize": "craft/grad_cos"}
    config = base.changed({"objective": objective, "craft.enabled": False, "train.steps": 2})
    _, plan, trial = start_sweep(config, tmp_path / "sweep")
    with pytest.raises(CraftError, match=r"objective: craft/grad_cos has no value"):
        list(reports(trial, plan, in_process))


@pytest.mark.parametrize(("params", "expected"), [({}, [4, 5, 6]), ({"seed": 9}, [9, 10, 11])])
def test_the_seeds_of_a_setting_follow_each_other(params: Params, expected: list[int], base: Experiment) -> None:
    assert seeds(base.changed({"seed": 4, "sweep.repeat": 3}), params) == expected


# --- folders ------------------------------------------------------------------------------------------------------


def report_of(step: int, value: float = 0.5, **metrics: float) -> Report:
    """A report as a trial makes it."""
    return {
        "step": step, "seeds": 1, "params": PARAMS, "metrics": {"new/score": value, **metrics}, "value": value,
        "reached": {}, "violations": {}, "feasible": True, "score": value, "seconds": 1.0,
    }  # fmt: skip


def test_a_sweep_is_started_once_and_read_back_unchanged(base: Experiment, tmp_path: Path) -> None:
    folder, plan, _ = start_sweep(base, tmp_path / "sweep")
    with pytest.raises(
        ConfigError, match=r"already holds a sweep: resume it with --resume .*, or choose another folder"
    ):
        folder.begin(plan)
    assert folder.load() == plan
    assert list(folder.load().space.knobs) == list(KNOBS), "in the order of the file: conditions refer upwards"
    with pytest.raises(ConfigError, match="is not empty and holds no sweep"):
        SweepFolder(tmp_path).begin(plan)
    with pytest.raises(ConfigError, match="holds no sweep"):
        SweepFolder(tmp_path / "elsewhere").load()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".sweep.yaml.17.tmp").write_text("half writ")
    SweepFolder(tmp_path / "killed").begin(plan)


@pytest.mark.parametrize("key", ["task", "validation.new.data"])
def test_a_sweep_whose_data_were_exchanged_trains_no_further_trial(key: str, base: Experiment, tmp_path: Path) -> None:
    data, path = tmp_path / "data.parquet", tmp_path / "sweep"
    held_out = base.validation.new
    assert isinstance(held_out, SampleEvalSet)
    original = Path(base.task.path if key == "task" else held_out.data.path).read_bytes()
    data.write_bytes(original)
    config = base.changed({f"{key}.path": str(data), "sweep.samples": 1})
    folder, plan = plan_sweep(config, parse_space(KNOBS, "space.yaml"), path)
    named = f"{key}.path {data}"
    assert resume_sweep(path)[1] == plan
    pq.write_table(pq.read_table(data).slice(1), data)
    with pytest.raises(ConfigError) as caught:
        resume_sweep(path)
    expected = f"{named} is not what it was when the sweep {path} began: its data had the fingerprint "
    assert caught.value.message.startswith(expected + plan.data[named][:12])
    assert "\n" not in caught.value.message
    assert folder.load() == plan

    trial = folder.trial(0)
    trial.begin(PARAMS)
    trial.end("finished")
    assert resume_sweep(path)[1] == plan  # nothing is left to train
    with pytest.raises(ConfigError, match="is not what it was when the sweep"):
        resume_sweep(path, samples=2)

    earlier = yaml.safe_load(folder.plan.read_text())
    del earlier["data"]  # of a version that recorded none
    folder.plan.write_text(yaml.safe_dump(earlier))
    assert resume_sweep(path, samples=2)[1].data[named] != plan.data[named]
    data.write_bytes(original)
    with pytest.raises(ConfigError, match="is not what it was when the sweep"):
        resume_sweep(path)


def test_trials_are_numbered_and_only_those_that_have_started_count(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    assert folder.trials() == []
    for number in (10_000, 2, 9_999, 11):
        folder.trial(number).begin({"craft.lambda_lr": number / 7})
    folder.trial(5).path.mkdir()
    assert [trial.number for trial in folder.trials()] == [2, 11, 9_999, 10_000]
    assert folder.trial(5).params() is None
    assert folder.trial(11).params() == {"craft.lambda_lr": 11 / 7}
    folder.assign("abc_00001", 11)
    assert folder.trial_of("abc_00001").path == folder.trial(11).path


def test_the_first_recorded_outcome_stays(tmp_path: Path) -> None:
    trial = SweepFolder(tmp_path).trial(3)
    assert trial.outcome().status == "open"
    trial.end("finished")
    trial.end("stopped")
    trial.end("failed", "too late")
    assert trial.outcome().status == "finished"
    assert trial.outcome().reason is None


def test_going_back_drops_the_reports_that_are_repeated(tmp_path: Path) -> None:
    trial = SweepFolder(tmp_path).trial(0)
    assert trial.reports() == []
    for step in (2, 4, 6):
        trial.add_report(report_of(step, 0.1))
    trial.add_report(report_of(4, 0.9))
    assert [(report["step"], report["value"]) for report in trial.reports()] == [(2, 0.1), (4, 0.9)]
    trial.add_report(report_of(6, 0.9))
    assert [report["step"] for report in trial.reports()] == [2, 4, 6]


def test_a_line_that_was_half_written_is_left_out(tmp_path: Path) -> None:
    trial = SweepFolder(tmp_path).trial(0)
    trial.add_report(report_of(2))
    with (trial.path / "reports.jsonl").open("a") as file:
        file.write('{"step": 4, "val')
    assert trial.reports() == [report_of(2)]
    trial.add_report(report_of(4))
    assert trial.reports() == [report_of(2), report_of(4)]


# --- results ------------------------------------------------------------------------------------------------------

MIXED: dict[str, Any] = {
    "craft.lambda_lr": {"loguniform": [0.02, 0.5]},
    "craft.retention_freq": {"choice": [1, 2, 5]},
    "craft.use_grad_projection": {"choice": [True, False]},
    "craft.loss_type": {"choice": ["relative_mse", "cosine"]},
    "craft.epsilon_start": {"choice": [0.002, 0.001]},
    "craft.layers": {"choice": [[-1], [-2, -1]]},
    "train.max_grad_norm": {"choice": [None, 1, 0.5]},
    "craft.conflict_threshold": {"uniform": [-0.5, 0.5], "when": {"craft.use_grad_projection": True}},
}
SETTING: Params = {
    "craft.lambda_lr": 0.25, "craft.retention_freq": 2, "craft.use_grad_projection": False,
    "craft.loss_type": "cosine", "craft.epsilon_start": 0.001, "craft.layers": [-1], "train.max_grad_norm": None,
}  # fmt: skip


@pytest.fixture
def sweep(base: Experiment, tmp_path: Path) -> SweepFolder:
    """A sweep over knobs of every type, with a bound on the old skill."""
    objective = {"maximize": "new/score", "subject_to": {"old/ratio": ">= 0.9"}}
    folder = SweepFolder(tmp_path / "sweep")
    folder.begin(Plan(base.changed({"objective": objective}), parse_space(MIXED, "space.yaml"), ["test"]))
    return folder


def add_trial(
    folder: SweepFolder, number: int, status: str | None, scores: Sequence[tuple[float, float]], **params: Any
) -> None:
    """A trial on disk with these (new/score, old/ratio) at its validations."""
    trial = folder.trial(number)
    setting = SETTING | {key.replace("__", "."): value for key, value in params.items()}
    trial.begin(setting)
    objective = folder.load().config.objective
    assert objective is not None
    for index, (new, old) in enumerate(scores, 1):
        metrics = {"new/score": new, "old/ratio": old}
        found = judge(objective, [metrics])
        report = report_of(2 * index, new) | {"params": setting, "metrics": metrics, "seconds": 1.5 * index}
        trial.add_report(report | asdict(found) | {"feasible": found.feasible})
    if status is not None:
        trial.end(status, "the loss is nan" if status == "failed" else None)  # type: ignore[arg-type]


@pytest.fixture
def ended(sweep: SweepFolder) -> SweepFolder:
    """Trials that ended in every way."""
    add_trial(sweep, 0, "finished", [(0.5, 1.0), (0.6, 0.95)])
    add_trial(
        sweep, 1, "finished", [(0.9, 1.0), (0.95, 0.5)], craft__retention_freq=1
    )  # best metric, bound broken most
    add_trial(sweep, 2, "stopped", [(0.99, 1.0)], craft__use_grad_projection=True, craft__conflict_threshold=0.25)
    add_trial(sweep, 3, "failed", [], craft__layers=[-2, -1])
    add_trial(sweep, 4, "finished", [(0.1, 1.0), (0.8, 0.9)], train__max_grad_norm=1)
    add_trial(sweep, 5, "finished", [(0.7, 0.89)], train__max_grad_norm=0.5)
    add_trial(sweep, 6, None, [(0.3, 1.0)])
    return sweep


def test_the_ranking(ended: SweepFolder) -> None:
    result = read_results(ended)
    assert [trial.number for trial in result.ranking] == [4, 0, 5, 1]
    assert [trial.feasible for trial in result.ranking] == [True, True, False, False]
    assert result.best is not None
    assert result.best.number == 4
    assert [trial.outcome.status for trial in result.trials] == [
        *("finished", "finished", "stopped", "failed", "finished", "finished", "open"),
    ]
    assert result.trials[3].feasible is None


def test_where_none_is_within_the_bounds_the_least_violating_is_best(sweep: SweepFolder) -> None:
    add_trial(sweep, 0, "finished", [(0.99, 0.3)])
    add_trial(sweep, 1, "finished", [(0.01, 0.8)])
    add_trial(sweep, 2, "stopped", [(0.9, 1.0)])
    best = read_results(sweep).best
    assert best is not None
    assert (best.number, best.feasible) == (1, False)
    write_results(read_results(sweep), sweep)
    assert "old/ratio 0.8, bound >= 0.9: NOT kept" in (sweep.path / "best.yaml").read_text()


TYPES = {
    "param:craft.lambda_lr": pa.float64(),
    "param:craft.retention_freq": pa.int64(),
    "param:craft.use_grad_projection": pa.bool_(),
    "param:craft.loss_type": pa.string(),
    "param:craft.epsilon_start": pa.float64(),
    "param:craft.layers": pa.string(),
    "param:train.max_grad_norm": pa.float64(),
    "param:craft.conflict_threshold": pa.float64(),
}


def test_the_table_has_every_trial_in_the_types_of_its_knobs(ended: SweepFolder) -> None:
    write_results(read_results(ended), ended)
    path = ended.path / "trials.parquet"
    table = pq.read_table(path)
    assert {name: table.schema.field(name).type for name in TYPES} == TYPES
    rows = table.to_pylist()
    assert [row["trial"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["rank"] for row in rows] == [2, 4, None, None, 1, 3, None]
    assert [row["feasible"] for row in rows] == [True, False, True, None, True, False, True]
    assert [row["steps"] for row in rows] == [4, 4, 2, 0, 4, 2, 2]
    assert [row["param:train.max_grad_norm"] for row in rows] == [None, None, None, None, 1.0, 0.5, None]
    assert [row["param:craft.conflict_threshold"] for row in rows] == [None, None, 0.25, None, None, None, None]
    assert json.loads(rows[3]["param:craft.layers"]) == [-2, -1]
    assert rows[3]["reason"] == "the loss is nan"
    assert [(report["step"], report["value"]) for report in rows[4]["reports"]] == [(2, 0.1), (4, 0.8)]
    assert dict(rows[4]["reports"][0]["metrics"]) == {"new/score": 0.1, "old/ratio": 1.0}
    assert rows[1]["violation"] == pytest.approx(0.4 / 0.9)
    assert rows[3]["reports"] == []


def test_polars_and_duckdb_read_the_table(ended: SweepFolder) -> None:
    write_results(read_results(ended), ended)
    path = ended.path / "trials.parquet"
    frame = polars.read_parquet(path)
    ranked = frame.filter(polars.col("rank").is_not_null()).sort("rank")
    assert ranked["trial"].to_list() == [4, 0, 5, 1]
    assert frame.select(polars.col("reports").list.len())["reports"].to_list() == [2, 2, 1, 0, 2, 1, 1]
    assert frame["param:craft.use_grad_projection"].to_list() == [False, False, True, False, False, False, False]
    rows = (
        duckdb.connect()
        .execute(
            f"""select trial, "param:craft.lambda_lr", reports[-1].metrics['old/ratio'] from '{path}'
            where feasible and status = 'finished' order by rank"""
        )
        .fetchall()
    )
    assert rows == [(4, 0.25, 0.9), (0, 0.25, 0.95)]


def test_a_setting_that_is_not_a_valid_config_is_still_in_the_table(sweep: SweepFolder) -> None:
    add_trial(sweep, 0, "finished", [(0.5, 1.0)])
    add_trial(sweep, 1, "failed", [], craft__retention_freq=1.5)
    write_results(read_results(sweep), sweep)
    configs = pq.read_table(sweep.path / "trials.parquet")["config"].to_pylist()
    assert configs[1] is None
    assert "retention_freq: 2" in configs[0]


def test_a_sweep_whose_trials_all_failed_gives_the_first_reason_and_leaves_its_table(sweep: SweepFolder) -> None:
    add_trial(sweep, 0, "stopped", [(0.5, 1.0)])
    add_trial(sweep, 1, "failed", [])
    add_trial(sweep, 2, "failed", [])
    with pytest.raises(CraftError, match=r"no trial of the sweep .* finished \(trial 1: the loss is nan\)"):
        write_results(read_results(sweep), sweep)
    assert len(pq.read_table(sweep.path / "trials.parquet")) == 3
    assert not (sweep.path / "best.yaml").exists()


def test_a_sweep_without_a_finished_trial_says_so(sweep: SweepFolder) -> None:
    add_trial(sweep, 0, "stopped", [(0.5, 1.0)])
    with pytest.raises(CraftError, match=r"finished \(all are stopped or open\)"):
        write_results(read_results(sweep), sweep)


def test_training_the_best_again_gives_its_numbers_bit_for_bit(
    base: Experiment, whole: tuple[SweepFolder, list[Report]], tmp_path: Path
) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    shutil.copytree(whole[0].path, folder.path)
    write_results(read_results(folder), folder)
    heading = (folder.path / "best.yaml").read_text().splitlines()[0]
    assert heading.startswith("# Trial 0 of 1: new/ratio ")
    config = load_config(folder.path / "best.yaml", base=tmp_path)
    assert config == base.changed({**PARAMS, "name": "sweep-trial0"})
    again, trial = RunFolder(tmp_path / "again"), folder.trial(0).run(0)
    again.begin(config, ["test"])
    train(config, again, OneWorker(), NullObserver())
    assert again.validation.read_bytes() == trial.validation.read_bytes()
    assert _untimed_metrics(again) == _untimed_metrics(trial)
    result = again.finished()
    assert result is not None
    assert result["new"]["after"] is not None, "the evaluation data, which the sweep has not used, is scored now"


def _untimed_metrics(folder: RunFolder) -> list[Mapping[str, Any]]:
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in folder.read_metrics()]


def test_a_driver_killed_before_it_recorded_what_it_logged_logs_nothing_twice(base: Experiment, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    database = f"sqlite:///{tmp_path / 'runs.db'}"
    folder = SweepFolder(tmp_path / "sweep")
    plan = Plan(base.changed({"tracking.mlflow": database}), parse_space(KNOBS, "two"), [])
    folder.begin(plan)
    trial = folder.trial(0)
    trial.begin(PARAMS)
    tracking = SweepTracking(folder, plan, say=pytest.fail)
    notes = folder.path / "tracking-mlflow.json"
    for step in (2, 4):
        recorded = notes.read_text() if notes.exists() else None
        trial.add_report({"step": step, "metrics": {"new/ratio": step / 10}, "score": 0.0, "feasible": True})
        tracking.sync(trial)
    assert recorded is not None
    notes.write_text(recorded)  # as if the driver had died between logging step 4 and recording it
    trial.end("finished")
    SweepTracking(folder, plan, say=pytest.fail).sync(trial)
    client = mlflow.MlflowClient(tracking_uri=database, registry_uri=database)
    run = json.loads(notes.read_text())["0"]["id"]
    assert [entry.step for entry in client.get_metric_history(run, "new/ratio")] == [2, 4]
