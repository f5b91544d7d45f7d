"""A run that keeps its best checkpoint: which one, that its result belongs to it, its resumption, its early end."""

from __future__ import annotations

import html
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from craft_pipelines.compare import arm_config

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError, DataError
from craft_ray.report.html import write_report
from craft_ray.run.best import BestValidation
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import result_lines, unreached
from craft_ray.run.mirror import mirrored_folder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train, training
from craft_ray.storage.last import point_last
from craft_ray.storage.paths import ObjectPath
from craft_ray.sweep.trials import TrialFolder, trial_config
from craft_ray.workers import OneWorker
from tests.support.experiments import Digits
from tests.support.runs import trained

CLOSEST = {"minimize": "heldout/retention_loss"}
"""The checkpoint that is closest to the teacher: in a run without retention the first one."""


def choosing(digits: Digits, folder: Path, changes: dict[str, Any] | None = None) -> Experiment:
    """A run that moves away from the teacher at each step, and may keep the validation that is closest to it."""
    own = {
        "craft.initial_lambda": 0.0,
        "craft.lambda_lr": 0.0,
        "craft.lambda_floor": 0.0,
        "craft.use_grad_projection": False,
        "validation.every": 2,
        "train.checkpoint_every": 0,
        "train.keep_checkpoints": 1,
        "train.keep_best": CLOSEST,
    }
    return digits.experiment(folder, {**digits.scored(8), **own, **(changes or {})})


def weights(folder: RunFolder, name: str = "last") -> bytes:
    return (folder.checkpoints / name / "model" / "model.safetensors").read_bytes()


def result_of(folder: RunFolder) -> dict[str, Any]:
    result = folder.finished()
    assert result is not None
    return {**result, "seconds": None}


@pytest.fixture(scope="module")
def best(digits: Digits, cached: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An uninterrupted run. Read only."""
    return trained(choosing(digits, cached), tmp_path_factory.mktemp("run") / "run")


def test_the_model_and_the_result_are_those_of_the_best_validation(
    best: RunFolder, digits: Digits, cached: Path, tmp_path: Path
) -> None:
    losses = {record["step"]: record["heldout/retention_loss"] for record in best.read_validation()}
    assert list(losses) == [2, 4, 6]
    assert min(losses, key=losses.__getitem__) == 2, "the problem is not the one that this test is about"
    result = result_of(best)
    kept = result["kept"]
    assert (kept["step"], kept["trained_steps"], kept["ended_early"], kept["value"]) == (2, 6, False, losses[2])
    assert result["steps"] == 2
    assert result["retention_loss"] == losses[2]
    assert sorted(path.name for path in best.checkpoints.glob("step_*")) == ["step_000002", "step_000006"]
    assert weights(best) == weights(best, "step_000002") != weights(best, "step_000006")
    assert result_lines(result)[0].startswith("kept step 2: the best validation, heldout/retention_loss")

    whole = choosing(
        digits, cached, {"train.keep_best": None, "train.checkpoint_every": 2, "train.keep_checkpoints": 3}
    )
    plain = trained(whole, tmp_path / "plain")
    assert weights(plain, "step_000002") == weights(best), "choosing changes nothing in the training"
    assert plain.read_validation() == best.read_validation()
    assert "kept" not in result_of(plain)


@pytest.mark.parametrize("validations", [1, 2])
def test_a_resumed_run_keeps_the_same(
    best: RunFolder, digits: Digits, cached: Path, tmp_path: Path, validations: int
) -> None:
    config, folder = choosing(digits, cached), RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    with closing(training(config, folder, OneWorker(), NullObserver())) as run:
        for _ in range(validations):
            next(run)
    train(config, folder, OneWorker(), NullObserver())
    assert result_of(folder) == result_of(best)
    assert weights(folder) == weights(best)


def test_patience_ends_a_run_early(digits: Digits, cached: Path, best: RunFolder, tmp_path: Path) -> None:
    config, folder = choosing(digits, cached, {"train.patience": 1}), RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    with closing(training(config, folder, OneWorker(), NullObserver())) as run:
        assert [next(run)["step"], next(run)["step"]] == [2, 4]  # and is lost before its end
    train(config, folder, OneWorker(), NullObserver())
    assert [record["step"] for record in folder.read_validation()] == [2, 4]
    kept = result_of(folder)["kept"]
    assert (kept["step"], kept["trained_steps"], kept["ended_early"]) == (2, 4, True)
    assert weights(folder) == weights(best)
    assert "training ended early, at step 4" in result_lines(result_of(folder))[0]


def test_a_budget_that_the_kept_step_never_had_is_reported(digits: Digits, cached: Path, tmp_path: Path) -> None:
    budget = {"craft.epsilon_start": 0.5, "craft.epsilon_end": 0.1, "craft.epsilon_schedule": "linear"}
    config = choosing(digits, cached, {**budget, "craft.lambda_lr": 1e-6, "train.patience": 1})
    result = result_of(trained(config, tmp_path / "run"))
    assert (result["steps"], result["epsilon"]) == (2, 0.1)
    assert result["epsilon_at_step"] == pytest.approx(0.5 - 0.4 / 5)  # of six steps the second
    said = "(ε was 0.42 at the model's last step)"
    assert any(line.endswith(said) for line in result_lines(result))
    write_report([RunFolder(tmp_path / "run")], tmp_path / "report", title="", command="")
    assert said in html.unescape((tmp_path / "report" / "report.html").read_text())
    for other in ({key: result[key] for key in result if key != "epsilon_at_step"}, {**result, "epsilon": 0.42}):
        assert unreached(other) == ""


def test_a_run_in_an_object_store_keeps_the_same(
    best: RunFolder, digits: Digits, cached: Path, object_store: ObjectPath
) -> None:
    config, folder = choosing(digits, cached), RunFolder(object_store / "best" / "run")
    folder.begin(config, ["test"])
    with (
        mirrored_folder(folder) as mirror,
        closing(training(config, mirror, OneWorker(), NullObserver())) as run,
    ):
        assert [next(run)["step"], next(run)["step"]] == [2, 4]  # the best is not the last
    with mirrored_folder(folder) as mirror:
        train(config, mirror, OneWorker(), NullObserver())
    assert result_of(folder)["kept"] == result_of(best)["kept"]
    assert (folder.checkpoints / "last").read_text() == "step_000002"
    assert weights(folder, "step_000002") == weights(best)


def judged(digits: Digits, folder: Path, objective: dict[str, Any], values: list[float], patience: int = 0) -> Any:
    """Which of these validations is kept, and whether the run ends after each."""
    scored = digits.scored(8)["evaluation.new"]
    changes = {"train.keep_best": objective, "train.patience": patience, "validation.new": scored}
    found = BestValidation(choosing(digits, folder, changes))
    ends = []
    for number, value in enumerate(values, 1):
        found.observe([{"step": 2 * number, "new/score": value, "heldout/violation": 0.1 * number}])
        ends.append(found.exhausted)
    return found, ends


def test_the_first_of_equal_validations_is_kept(digits: Digits, cached: Path) -> None:
    found, ends = judged(digits, cached, {"maximize": "new/score"}, [0.5, 0.7, 0.7, 0.6], patience=2)
    assert found.step == 4
    assert ends == [False, False, False, True]


def test_a_bound_comes_before_the_metric(digits: Digits, cached: Path) -> None:
    bounded = {"maximize": "new/score", "subject_to": {"heldout/violation": "<= 0.25"}}
    found, _ = judged(digits, cached, bounded, [0.5, 0.7, 0.9])
    assert found.step == 4
    assert found.described(6)["kept"]["feasible"]
    unmet = {"maximize": "new/score", "subject_to": {"heldout/violation": "<= 0.05"}}
    found, _ = judged(digits, cached, unmet, [0.5, 0.7, 0.9])
    assert found.step == 2, "the smallest violation"
    assert not found.described(6)["kept"]["feasible"]
    with pytest.raises(DataError, match=r"train\.keep_best: new/score is nan: it must be finite"):
        judged(digits, cached, {"maximize": "new/score"}, [float("nan")])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.keep_best": None, "train.patience": 3}, "add train.keep_best"),
        ({"validation.every": 0}, "validation.every is 0"),
        ({"validation.every": 6}, "validation.every is 6"),
        ({"workers.sharding": "full", "workers.num_workers": 2}, "sharded checkpoints have one at the last step alone"),
        ({"train.keep_checkpoints": 0}, "train.keep_checkpoints is 0"),
        ({"train.keep_best": {"maximize": "new/score"}}, "train.keep_best: a score of the new skill needs data"),
        ({"train.keep_best": {"minimize": "train/loss"}}, "'train/loss' is not measured in validations"),
        ({"train.keep_best": {"maximize": "heldout/violation"}}, "train.keep_best: lower heldout/violation is better"),
    ],
)
def test_mistakes_are_one_line(digits: Digits, cached: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BestValidation(choosing(digits, cached, changes))
    assert words in caught.value.message


def test_a_comparison_chooses_in_each_arm_and_a_sweep_by_its_own_objective(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    config = choosing(digits, cached, {"validation.new": digits.scored(8)["evaluation.new"]})
    arm = arm_config(config, "baseline", 1, tmp_path, ["baseline", "hidden"])
    assert (arm.validation, arm.train.keep_best) == (config.validation, config.train.keep_best)
    trial = trial_config(config, {}, TrialFolder(tmp_path / "trials" / "0000"), 0)
    assert (trial.train.keep_best, trial.train.keep_checkpoints) == (None, 0)


def test_a_run_that_is_lost_while_it_is_scored_trains_nothing_again(
    best: RunFolder, digits: Digits, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = choosing(digits, cached), RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    with monkeypatch.context() as lost:
        lost.setattr(Run, "_stationarity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, folder, OneWorker(), NullObserver())
    assert (folder.checkpoints / "last").resolve().name == "step_000006"
    monkeypatch.setattr(Run, "loop", interrupted)
    train(config, folder, OneWorker(), NullObserver())
    assert result_of(folder) == result_of(best)
    assert weights(folder) == weights(best)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_checkpoints_behind_the_one_that_a_run_went_back_to_make_room_for_its_own(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    """The process was lost after `last` was pointed to the best checkpoint, and before the result was written."""
    config = digits.experiment(cached, {"train.keep_checkpoints": 2})
    folder = trained(config, tmp_path / "run")
    folder.result.unlink()
    for step in (8, 10):
        shutil.copytree(folder.checkpoints / "step_000006", folder.checkpoints / f"step_{step:06d}")
    point_last(folder.disk / "checkpoints", "step_000004")
    train(config, folder, OneWorker(), NullObserver())
    assert sorted(path.name for path in folder.checkpoints.glob("step_*")) == ["step_000004", "step_000006"]
    assert (folder.checkpoints / "last").resolve().name == "step_000006"


def test_the_certificate_is_of_the_model_that_is_kept(digits: Digits, cached: Path, tmp_path: Path) -> None:
    """Where no test data judge, the validation data do, and the last validation was of another model."""
    scored = digits.scored(8)
    changes = {
        "evaluation.old": None,
        "validation.old": scored["evaluation.old"] | {"metric": "perplexity"},
        "craft.keep": 0.5,
        "craft.epsilon_start": 0.05,
    }
    run = trained(choosing(digits, cached, changes), tmp_path / "run")
    ratios = {record["step"]: record["old/ratio"] for record in run.read_validation()}
    result = result_of(run)
    assert result["certificate"]["judged_on"] == "validation"
    assert result["certificate"]["kept"] == ratios[result["kept"]["step"]] != ratios[6]


def test_a_run_whose_patience_ends_with_its_steps_did_not_end_early(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    run = trained(choosing(digits, cached, {"train.patience": 2}), tmp_path / "run")
    kept = result_of(run)["kept"]
    assert (kept["step"], kept["trained_steps"], kept["ended_early"]) == (2, 6, False)
