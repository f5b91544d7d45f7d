"""A run that keeps a stated part of the old skill: its budget, its certificate, its resumption, and what it refuses."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from craft_pipelines.compare import met
from safetensors.torch import load_file

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError, DataError
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import result_lines, validation_line
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train, training
from craft_ray.workers import OneWorker
from tests.support.experiments import ANSWERED, Digits
from tests.support.runs import trained


def keeping(digits: Digits, folder: Path, changes: dict[str, Any] | None = None) -> Experiment:
    """A run whose budget follows the old skill, scored by a perplexity, which changes with the last bit of a weight."""

    def scored(split: str) -> dict[str, Any]:
        data = {"path": str(digits.data / f"old_{split}.parquet"), "columns": ANSWERED, "limit": 24}
        return {"data": data, "metric": "perplexity"}

    own = {"craft.keep": 0.9, "validation.old": scored("val"), "validation.every": 2, "evaluation.old": scored("test")}
    return digits.experiment(folder, {**own, **(changes or {})})


def weights(folder: RunFolder) -> bytes:
    return (folder.checkpoints / "last" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def kept(digits: Digits, cached: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An uninterrupted run. Read only."""
    return trained(keeping(digits, cached), tmp_path_factory.mktemp("kept") / "run")


def test_the_budget_of_a_step_is_what_the_last_validation_made_it(kept: RunFolder) -> None:
    budgets = [record["craft/epsilon"] for record in kept.read_metrics()]
    *moved, last = [record.get("craft/next_epsilon") for record in kept.read_validation()]
    assert budgets == [budgets[0], budgets[0], moved[0], moved[0], moved[1], moved[1]]
    assert len({budgets[0], *moved}) == 3
    result = kept.finished()
    assert result is not None
    assert last is None, "no step follows the last validation"
    assert (result["epsilon"], result["lambda"]) == (budgets[-1], kept.read_metrics()[-1]["craft/lambda"])
    assert "kept, next ε=" in validation_line(kept.read_validation()[0], 6)


def test_the_result_certifies_the_target_on_test_data(kept: RunFolder) -> None:
    result = kept.finished()
    assert result is not None
    certificate = result["certificate"]
    assert certificate["keep"] == 0.9
    assert certificate["judged_on"] == "evaluation"
    assert certificate["kept"] == result["old"]["ratio"]
    assert (certificate["kept_low"], certificate["kept_high"]) == (
        result["old"]["ratio_low"],
        result["old"]["ratio_high"],
    )
    assert result["feasible"] == (certificate["kept"] >= 0.9)
    assert result["slackness"] == result["lambda"] * (result["retention_loss"] - result["epsilon"])
    assert any(line.startswith("keep 90% of the old skill: ") for line in result_lines(result))


@pytest.mark.parametrize(("checkpoint_every", "closed_at"), [(2, 4), (3, 4)])
def test_a_resumed_run_continues_with_the_same_budgets(
    checkpoint_every: int, closed_at: int, kept: RunFolder, digits: Digits, cached: Path, tmp_path: Path
) -> None:
    """Closed after a validation whose checkpoint was written just before it, and after one without a checkpoint."""
    config = keeping(digits, cached, {"train.checkpoint_every": checkpoint_every})
    cut = RunFolder(tmp_path / "run")
    cut.begin(config, ["test"])
    with closing(training(config, cut, OneWorker(), NullObserver())) as validations:
        while next(validations)["step"] < closed_at:
            pass
    train(config, cut, OneWorker(), NullObserver())
    assert cut.read_validation() == kept.read_validation()
    assert [r["craft/epsilon"] for r in cut.read_metrics()] == [r["craft/epsilon"] for r in kept.read_metrics()]
    assert weights(cut) == weights(kept)
    assert load_file(cut.checkpoints / "last" / "model" / "model.safetensors")


def test_a_rate_of_zero_does_not_excuse_a_missed_target(digits: Digits, cached: Path, tmp_path: Path) -> None:
    """The validations move the multiplier, so the run is held to the target."""
    changes = {"craft.keep": 0.999999, "craft.lambda_lr": 0.0, "craft.initial_lambda": 0.1}
    changes |= {"craft.lambda_floor": 0.0, "train.learning_rate": 0.02}
    folder = trained(keeping(digits, cached, changes), tmp_path / "run")
    result = folder.finished()
    assert result is not None
    assert len({record["craft/lambda"] for record in folder.read_metrics()}) == 3
    assert result["multiplier"] == "adaptive"
    assert not result["feasible"]
    assert not met({"runs": [result]}), "exit code 3"


def test_without_test_data_the_validation_data_judge(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = keeping(digits, cached, {"evaluation.old": None, "train.steps": 3})
    folder = trained(config, tmp_path / "run")
    result = folder.finished()
    assert result is not None
    assert result["certificate"]["judged_on"] == "validation"
    assert result["certificate"]["kept"] == folder.read_validation()[-1]["old/ratio"]


def test_a_teacher_that_scores_zero_is_refused_before_the_first_step(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    data = {"path": str(digits.data / "old_val.parquet"), "columns": ANSWERED, "limit": 2}
    config = keeping(digits, cached, {"validation.old": {"data": data, "metric": "exact_match", "max_new_tokens": 1}})
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(DataError, match=r"craft\.keep 0\.9: the teacher scores 0 on validation\.old"):
        train(config, folder, OneWorker(), NullObserver())
    assert not folder.read_metrics()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"validation.old": None}, r"craft\.keep 0\.9 is measured on validation data of the old skill: add validation"),
        ({"validation.every": 0}, r"moves the budget at each validation, and validation\.every is 0 in a run of 6"),
        ({"validation.every": 6}, r"validation\.every is 6 in a run of 6 steps: set it to e\.g\. 1"),
        (
            {"craft.epsilon_schedule": "cosine", "craft.epsilon_end": 0.0001},
            r"craft\.epsilon_schedule is cosine: leave one of them out",
        ),
        ({"craft.keep": 1.0}, r"craft\.keep"),
    ],
)
def test_what_a_target_needs(changes: dict[str, Any], said: str, digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        keeping(digits, tmp_path, changes)


def test_plain_fine_tuning_ignores_the_target(digits: Digits, tmp_path: Path) -> None:
    """The baseline arm of a comparison has the same config."""
    assert keeping(digits, tmp_path, {"craft.enabled": False, "validation.every": 0}).arm == "baseline"
