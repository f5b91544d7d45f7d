"""The run as a whole, in this process: its numbers, how it resumes, which files it writes, and how it fails."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from craft_pipelines.anchors import build
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from craft_ray.config import dump_config, parse_config
from craft_ray.data.sample import Sample
from craft_ray.data.sampler import StepSampler
from craft_ray.data.source import open_source
from craft_ray.errors import CacheRefused, ConfigError, DataError, StorageError
from craft_ray.models import load_model
from craft_ray.models.base import Features
from craft_ray.models.features import FeatureCache
from craft_ray.models.vision_language import VisionLanguageModel
from craft_ray.run.checkpoint import TrainingState, save_checkpoint
from craft_ray.run.folder import RunFolder
from craft_ray.run.metrics import console_line, validation_line
from craft_ray.run.observers import NullObserver
from craft_ray.run.optimization import learning_rate
from craft_ray.run.task_data import TASK_STREAM
from craft_ray.run.training import Run, train, training
from craft_ray.storage.last import last_checkpoint
from craft_ray.tracking.tensorboard import TensorBoardObserver
from craft_ray.workers import OneWorker
from tests.support.experiments import ANSWERED, Digits
from tests.support.runs import measured, trained, weights


def test_baseline_equals_a_plain_adamw_loop_bit_for_bit(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached, {"craft.enabled": False})
    ours = weights(trained(config, tmp_path / "run"))

    model = load_model(config.model, "fp32")
    source = open_source(config.task, "task")
    optimizer = torch.optim.AdamW(
        model.module.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True
    )
    sampler = StepSampler(len(source), config.train.batch_size, config.seed, TASK_STREAM)
    for step in range(config.train.steps):
        samples = [source[row] for row in sampler.global_batch(step)]
        batch = model.collate([model.preprocess(s, model.response_tokens(s)) for s in samples])
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.train)
        optimizer.zero_grad()
        model.task_loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.module.parameters(), 1.0)
        optimizer.step()

    model.save(tmp_path / "plain")
    theirs = load_file(tmp_path / "plain" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"craft.retention_freq": 2, "craft.retention_mode": "token_ce", "craft.epsilon_start": 0.001},
        pytest.param({"train.optimizer": "adamw_8bit"}, marks=pytest.mark.slow, id="moments_in_8_bits"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    changes: dict, digits: Digits, cached: Path, tmp_path: Path
) -> None:
    if "train.optimizer" in changes:
        pytest.importorskip("torchao", reason="needs the extra 8bit")
    config = digits.experiment(cached, {"train.steps": 7, **changes})
    whole = trained(config, tmp_path / "whole")

    cut = RunFolder(tmp_path / "cut")
    cut.begin(config, ["test"])
    Run(config, cut, OneWorker(), NullObserver()).loop(until=5)  # past the checkpoint at 4: step 5 is repeated
    assert len(cut.read_metrics()) == 5
    train(config, cut, OneWorker(), NullObserver())

    assert measured(cut) == measured(whole)
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for key in ("retention_loss", "lambda", "feasible"):
        assert cut.finished()[key] == whole.finished()[key]


def test_a_restart_before_the_first_checkpoint_leaves_each_step_once(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    config = digits.experiment(cached, {"train.checkpoint_every": 0})
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    Run(config, folder, OneWorker(), NullObserver()).loop(until=3)
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "train/lo')  # a process was killed while it wrote
    train(config, folder, OneWorker(), NullObserver())
    assert [record["step"] for record in folder.read_metrics()] == [1, 2, 3, 4, 5, 6]


def test_the_teachers_score_belongs_to_its_preprocessing_and_moves_with_the_run(
    text_model: Path, text_data: Path, tmp_path: Path
) -> None:
    columns = {"id": "id", "prompt": "prompt", "response": "response"}
    evaluation = {"data": {"path": str(text_data / "old_test.parquet"), "columns": columns, "limit": 4}}
    tree = {
        "model": {"path": str(text_model)},
        "task": {"path": str(text_data / "new_train.parquet"), "columns": columns},
        "craft": {"enabled": False},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2},
        "evaluation": {"old": {**evaluation, "metric": "perplexity"}},
    }
    config = parse_config(tree, "test")
    before = {}
    for eos in (True, False):
        folder = trained(config.changed({"model.append_eos": eos}), tmp_path / "runs" / f"eos-{eos}")
        before[eos] = folder.finished()["old"]["before"]
    assert before[True] != before[False]

    started = RunFolder(tmp_path / "runs" / "started")
    started.begin(config, ["test"])
    run = Run(config, started, OneWorker(), NullObserver())
    run.held_out.score_teacher()
    run.loop(until=3)
    moved = RunFolder(tmp_path / "elsewhere" / "moved")
    moved.path.parent.mkdir()
    started.path.rename(moved.path)
    train(config, moved, OneWorker(), NullObserver())
    assert moved.finished()["old"]["before"] == before[True]


def test_pruning_keeps_the_newest_checkpoint_beyond_a_million_steps(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    model = load_model(digits.experiment(cached).model, "fp32")
    for step in (999_998, 999_999, 1_000_000):
        save_checkpoint(tmp_path / "checkpoints", model, TrainingState(step, {}, [], []), keep=2)
    assert last_checkpoint(tmp_path / "checkpoints").name == "step_1000000"
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == ["step_1000000", "step_999999"]
    shutil.rmtree(tmp_path / "checkpoints" / "step_1000000")
    with pytest.raises(StorageError, match="which is missing"):
        last_checkpoint(tmp_path / "checkpoints")


def test_the_projection_fires_and_the_log_says_so(digits: Digits, cached: Path, tmp_path: Path) -> None:
    records = measured(trained(digits.experiment(cached), tmp_path / "run"))
    assert records[0]["craft/grad_cos"] is None, "an untouched student has no retention gradient to compare"
    assert records[0]["craft/conflict"] is False
    assert any(record["craft/conflict"] for record in records)
    for record in records[1:]:
        assert -1 <= record["craft/grad_cos"] <= 1


def test_what_a_run_leaves_behind(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached, {**digits.scored(), "train.keep_checkpoints": 2})
    folder = trained(config, tmp_path / "run")
    assert folder.config() == config
    assert sorted(p.name for p in folder.checkpoints.glob("step_*")) == ["step_000004", "step_000006"]
    assert (folder.checkpoints / "last").resolve().name == "step_000006"
    assert {p.name for p in (folder.checkpoints / "last").iterdir()} == {"model", "training_state"}
    keys = [
        *("step", "train/loss", "train/grad_norm", "train/lr"),
        *("craft/retention_loss", "craft/lambda", "craft/weight", "craft/epsilon"),
        *("craft/grad_dot", "craft/grad_cos", "craft/conflict", "craft/projected"),
        *("perf/step_s", "perf/data_s"),
    ]
    assert [list(record) for record in folder.read_metrics()] == [keys] * 6
    result = json.loads(folder.result.read_text())
    assert result["arm"] == "hidden"
    assert result["heldout_anchors"] == 8
    for skill in ("old", "new"):
        assert 0 <= result[skill]["before"] <= 1
        assert len(folder.read_predictions(f"{skill}_after")) == 24
    env = json.loads((folder.path / "env.json").read_text())
    assert env["packages"]["torch"] == importlib.metadata.version("torch")
    # The checkpoint is an ordinary folder: it loads as a model with its processor, and is the trained one.
    again = load_model(config.model.model_copy(update={"path": str(folder.checkpoints / "last" / "model")}), "fp32")
    assert again.weights_fingerprint() != load_model(config.model, "fp32").weights_fingerprint()


def test_accumulation_minimises_the_same_loss(digits: Digits, cached: Path, tmp_path: Path) -> None:
    changes = {"train.steps": 2}
    one = trained(digits.experiment(cached, changes), tmp_path / "one")
    two = trained(digits.experiment(cached, {**changes, "train.accumulate": 4}), tmp_path / "two")
    for a, b in zip(measured(one), measured(two), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)


def test_bf16_starts_within_the_tolerance_of_bf16(digits: Digits, tmp_path: Path) -> None:
    config = digits.experiment(tmp_path, {"train.precision": "bf16", "train.steps": 2})
    build(config, say=lambda _: None)
    records = measured(trained(config, tmp_path / "run"))
    assert records[0]["craft/retention_loss"] < 1e-2
    assert all(math.isfinite(record["train/loss"]) for record in records)


def test_the_console_line_has_the_documented_form(digits: Digits, cached: Path, tmp_path: Path) -> None:
    folder = trained(digits.experiment(cached), tmp_path / "run")
    line = console_line(folder.read_metrics()[:3], 6, "hidden")
    number = r"-?\d+\.\d{3}"
    small = rf"({number}|\d\.\d\de-\d\d)"
    assert re.fullmatch(
        rf"Step 3/6 \| loss={number} \| grdn={number} \| lr=\d\.\de-\d\d \| updt_s={number} \| data_s={number} \| "
        rf"mode=hidden \| L_ret={small} \| λ={number} \| ε={small} \| weight={number} \| conflict=[✓✗] \| "
        rf"projected=[✓✗] \| dot={number} \| cos={number}",
        line,
    ), line


def test_the_console_shows_the_last_retention_step_if_retention_is_rarer_than_the_log(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    """Retention steps are 1, 4, ...: a log line every third step never falls on one."""
    folder = trained(digits.experiment(cached, {"craft.retention_freq": 3}), tmp_path / "run")
    records = folder.read_metrics()
    assert records[5]["craft/retention_loss"] is None
    line = console_line(records[3:6], 6, "hidden")
    assert f"L_ret={records[3]['craft/retention_loss']:.3f}" in line
    assert line.endswith("retention at step 4")
    assert "L_ret" not in console_line(records[4:6], 6, "hidden"), "a resumed run that has had no retention step yet"
    assert console_line(records[4:6], 6, "hidden", records[3]) == line, "the retention step was before the last line"


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    config = digits.experiment(cached, {"train.learning_rate": 1e30, "train.warmup_steps": 0, "train.steps": 50})
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(DataError, match=r"is nan at step \d+: look for NaN .* train.learning_rate"):
        train(config, folder, OneWorker(), NullObserver())
    assert not folder.checkpoints.exists(), "the second step's weights are not finite, and must not be saved"


def test_craft_without_a_cache_is_not_a_baseline(digits: Digits, tmp_path: Path) -> None:
    config = digits.experiment(tmp_path, {"craft.anchor_cache_dir": None})
    with pytest.raises(ConfigError, match=r"craft\.anchor_cache_dir names no cache"):
        train(config, RunFolder(tmp_path / "run"), OneWorker(), NullObserver())


def test_resuming_with_another_cache_is_refused(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached)
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    Run(config, folder, OneWorker(), NullObserver()).loop(until=3)
    other = digits.experiment(tmp_path, {"anchors.source.limit": 40})
    build(other, say=lambda _: None)
    with pytest.raises(CacheRefused, match="resume with the cache that it started with"):
        train(other, folder, OneWorker(), NullObserver())
    assert folder.config() == config, "what is refused leaves no trace"


FULL_DISK = """
import resource, sys
from pathlib import Path
from craft_ray.config import load_config
from craft_ray.errors import StorageError
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train
from craft_ray.workers import OneWorker
sys.path.insert(0, {root!r})
config = load_config({config!r})
folder = RunFolder(Path({run!r}))
Run(config, folder, OneWorker(), NullObserver()).loop(until=3)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # what a full disk looks like: writes fail
try:
    train(config, folder, OneWorker(), NullObserver())
except StorageError as error:
    print("REFUSED", error.message)
"""


def test_a_full_disk_damages_no_checkpoint(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    script = FULL_DISK.format(
        root=str(Path(__file__).parents[2]), config=str(tmp_path / "config.yaml"), run=str(tmp_path / "run")
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "REFUSED checkpoint" in output.stdout, output.stderr[-2000:]
    assert "earlier checkpoints are untouched" in output.stdout
    folder = RunFolder(tmp_path / "run")
    assert [p.name for p in folder.checkpoints.iterdir() if p.name != "last"] == ["step_000002"]
    train(config, folder, OneWorker(), NullObserver())  # with free space again it resumes
    assert folder.finished()["steps"] == 6


# --- validation ---------------------------------------------------------------------------------------------------


def validating(data: Path, every: int, **changes: Any) -> dict[str, Any]:
    """Changes that validate both skills: a score that changes with the last bit of a weight, and generated answers."""
    sets = {
        f"validation.{skill}": {
            "data": {"path": str(data / f"{skill}_val.parquet"), "columns": ANSWERED, "limit": 24},
            "metric": metric,
            "max_new_tokens": 2,
        }
        for skill, metric in (("old", "perplexity"), ("new", "exact_match"))
    }
    return {**sets, "validation.every": every, **changes}


@pytest.fixture(scope="module")
def validated_run(digits: Digits, cached: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An uninterrupted run with a validation after each step. Read only."""
    config = digits.experiment(cached, validating(digits.data, 1))
    return trained(config, tmp_path_factory.mktemp("validated") / "run")


def test_validation_does_not_change_the_training(
    validated_run: RunFolder, digits: Digits, cached: Path, tmp_path: Path
) -> None:
    blind = trained(digits.experiment(cached, {"train.log_every": 4}), tmp_path / "run")
    assert measured(validated_run) == measured(blind)
    ours, theirs = weights(validated_run), weights(blind)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not blind.validation.exists()
    assert [validation["step"] for validation in validated_run.read_validation()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("every", "steps"), [(0, [6]), (4, [4, 6]), (9, [6])])
def test_when_a_run_is_validated(every: int, steps: list[int], digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached, validating(digits.data, every))
    folder = trained(config, tmp_path / "run")
    validations = folder.read_validation()
    assert [validation["step"] for validation in validations] == steps
    expected = ["step", "old/score", "old/ratio", "old/bound", "new/score", "new/ratio"]
    assert all(
        list(validation) == [*expected, "heldout/retention_loss", "heldout/violation"] for validation in validations
    )
    last, result = validations[-1], folder.finished()
    assert last["heldout/retention_loss"] == result["retention_loss"]
    assert last["heldout/violation"] == result["violation"]
    teacher = json.loads((folder.path / "teacher_validation_old.json").read_text())["score"]["value"]
    assert last["old/ratio"] == teacher / last["old/score"]


@pytest.mark.parametrize(
    ("checkpoint_every", "every", "closed_at", "lost"),
    [
        *((2, 2, 2, False), (3, 2, 4, False), (2, 3, 3, False), (0, 2, 4, False)),
        *((2, 2, 4, True), (2, 2, 6, True), (0, 2, 4, True)),
    ],
)
def test_a_resumed_run_has_each_validation_once(
    checkpoint_every: int,
    every: int,
    closed_at: int,
    lost: bool,
    validated_run: RunFolder,
    digits: Digits,
    cached: Path,
    tmp_path: Path,
) -> None:
    """
    Args:
        lost: the process was lost while it wrote the validation, after the checkpoint of the same step if there is one.
    """
    changes = {"train.checkpoint_every": checkpoint_every, "train.keep_checkpoints": 1 if checkpoint_every else 0}
    config = digits.experiment(cached, validating(digits.data, every, **changes))
    cut = RunFolder(tmp_path / "run")
    cut.begin(config, ["test"])
    with closing(training(config, cut, OneWorker(), NullObserver())) as validations:
        while next(validations)["step"] < closed_at:
            pass
    if lost:
        lines = cut.validation.read_text().splitlines(keepends=True)
        cut.validation.write_text("".join(lines[:-1]) + lines[-1][:20])
    train(config, cut, OneWorker(), NullObserver())
    assert cut.read_validation() == [
        validation for validation in validated_run.read_validation() if validation["step"] % every == 0
    ]
    assert measured(cut) == measured(validated_run)


def test_a_run_that_was_lost_after_its_last_validation_is_concluded(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    config = digits.experiment(cached, validating(digits.data, 3))
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    with closing(training(config, folder, OneWorker(), NullObserver())) as validations:
        assert [next(validations)["step"], next(validations)["step"]] == [3, 6]
    assert folder.finished() is None
    seen = folder.read_validation()
    train(config, folder, OneWorker(), NullObserver())
    assert folder.finished()["steps"] == 6
    assert folder.read_validation() == seen


def test_a_run_that_is_closed_at_a_validation_is_left_open_for_others(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    config = digits.experiment(cached, validating(digits.data, 2))
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    with closing(training(config, folder, OneWorker(), NullObserver())) as validations:
        assert next(validations)["step"] == 2
    assert [record["step"] for record in folder.read_metrics()] == [1, 2], "the log is complete up to the validation"
    with (folder.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is still held


def test_validation_is_in_tensorboard_beside_the_steps(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached, validating(digits.data, 2))
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    with TensorBoardObserver(folder.path / "tensorboard", NullObserver(), enabled=True) as observer:
        train(config, folder, OneWorker(), observer)
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    validations = folder.read_validation()
    for key in ("old/score", "old/ratio", "new/score", "heldout/retention_loss", "heldout/violation"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(validation["step"], pytest.approx(validation[key])) for validation in validations]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_line_of_a_validation() -> None:
    validation = {
        "step": 25, "old/score": 0.875, "old/ratio": 0.9512, "new/score": 0.5, "new/ratio": None,
        "heldout/retention_loss": 0.0123456, "heldout/violation": 0.0,
    }  # fmt: skip
    assert validation_line(validation, 150) == (
        "Step 25/150 | validation | old 0.875 (95.1% of the teacher's) | new 0.500 | held-out L_ret=0.01235"
    )
    assert validation_line({"step": 2, "new/score": 1.0, "new/ratio": 2.0}, 4) == (
        "Step 2/4 | validation | new 1.000 (200.0% of the teacher's)"
    )


@pytest.mark.parametrize("checkpoint_every", [0, 2])
def test_a_run_that_keeps_no_checkpoints_leaves_none(
    checkpoint_every: int, digits: Digits, cached: Path, tmp_path: Path
) -> None:
    changes = {"train.keep_checkpoints": 0, "train.checkpoint_every": checkpoint_every}
    config = digits.experiment(cached, changes)
    folder = trained(config, tmp_path / "run")
    assert not folder.checkpoints.exists()
    assert folder.finished()["steps"] == 6


def test_no_sample_behind_the_next_validation_is_prepared(
    digits: Digits, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be prepared again after it; of a stream, every row of the pass would be read again."""
    prepared: list[int] = []
    prepare = Run._step_data
    monkeypatch.setattr(Run, "_step_data", lambda run, step: prepared.append(step) or prepare(run, step))
    folder = RunFolder(tmp_path / "run")
    folder.begin(digits.experiment(cached), ["test"])
    with closing(Run(digits.experiment(cached), folder, OneWorker(), NullObserver())) as run:
        run.loop(until=2)
        assert prepared == [0, 1]
        run.loop()
    assert prepared == [0, 1, 2, 3, 4, 5]


def test_runs_of_one_process_share_preprocessed_samples(
    cached: Path, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers do not depend on the sharing."""
    config = digits.experiment(cached, digits.scored())
    made: list[str] = []
    preprocess = VisionLanguageModel.preprocess

    def counted(self: VisionLanguageModel, sample: Sample, *rest: Any) -> Features:
        made.append(sample.id)
        return preprocess(self, sample, *rest)

    monkeypatch.setattr(VisionLanguageModel, "preprocess", counted)
    features, losses = FeatureCache(), []
    for name, shared in (("first", features), ("second", features), ("alone", None)):
        before = len(made)
        folder = RunFolder(tmp_path / name / "run")
        list(training(config, folder, OneWorker(), NullObserver(), shared))
        losses.append([record["train/loss"] for record in folder.read_metrics()])
        assert (len(made) > before) is (name != "second")
    assert losses[0] == losses[1] == losses[2]

    other = config.changed({"model.append_eos": False, "craft": {"enabled": False}, "evaluation": {}})
    before = len(made)
    list(training(other, RunFolder(tmp_path / "other" / "run"), OneWorker(), NullObserver(), features))
    assert len(made) > before, "another way to read the same data has other features"


def test_a_budget_that_the_run_does_not_reach_is_reported_and_the_reached_one_is_certified(
    digits: Digits, cached: Path, tmp_path: Path
) -> None:
    class Notes(NullObserver):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

    decay = {"craft.epsilon_schedule": "linear", "craft.epsilon_start": 0.5, "craft.epsilon_end": 0.1}
    for changes, certified in (({"craft.epsilon_decay_steps": 20}, 0.4), ({"craft.epsilon_decay": 0.8}, 0.1)):
        config, notes = digits.experiment(cached, {**decay, **changes}), Notes()
        folder = RunFolder(tmp_path / str(certified))
        folder.begin(config, ["test"])
        train(config, folder, OneWorker(), notes)
        assert folder.finished()["epsilon"] == pytest.approx(certified)
        assert folder.read_metrics()[-1]["craft/epsilon"] == pytest.approx(certified)
        assert folder.read_metrics()[-1]["craft/lambda"] == folder.finished()["lambda"]
        warned = [line for line in notes.lines if line.startswith("warning: ")]
        outlasts = "craft.epsilon_decay_steps 20, but the run has train.steps 6: it ends at 0.4 instead of 0.1"
        assert [outlasts in line for line in warned] == [True] * (certified == 0.4)
        for started in ("Retention mode: hidden", "CRaFT is enabled: hidden (layers [3, 4] at text_last"):
            assert len([line for line in notes.lines if line.startswith(started)]) == 1
        assert len([line for line in notes.lines if "anchors loaded" in line]) == 1
