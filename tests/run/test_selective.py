"""Masked tokens: which ones, that they are not learnt, and that a resumed run finds the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from craft_ray.config import Experiment
from craft_ray.data.source import open_source
from craft_ray.models import load_model
from craft_ray.models.capabilities import token_model
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.selective import TokenMask
from craft_ray.run.training import Run
from craft_ray.workers import OneWorker
from tests.support.caches import json_lines, text_experiment
from tests.support.runs import trained


def experiment(model: Path, folder: Path, threshold: float | None) -> Experiment:
    rows = [{"prompt": "abcdef"[: i % 4 + 1], "response": "xyzw"[: i % 4 + 1] * 2} for i in range(8)]
    source = json_lines(folder / "task.jsonl", rows)
    changes = {
        "task": {"path": str(source), "columns": {"response": "response"}},
        "craft.enabled": False, "craft.anchor_cache_dir": None, "train.mask_loss_above": threshold,
        "train.steps": 4, "train.checkpoint_every": 2, "train.batch_size": 8, "train.learning_rate": 1e-2,
    }  # fmt: skip
    return text_experiment(model, source, folder, changes)


def losses_of(config: Experiment) -> list[list[tuple[int, float]]]:
    """The teacher's loss on each response token of each row, with the token's place."""
    model = token_model(load_model(config.model, "fp32"))
    found = []
    for sample in open_source(config.task, "task"):  # type: ignore[arg-type]
        batch = model.collate([model.preprocess_task(sample)])
        losses_P = (-model.token_log_probs(batch)[0][0]).tolist()
        found.append([(place + 1, loss) for place, loss in zip(batch.keep_P.tolist(), losses_P, strict=True)])
    return found


def learnt_of(own: list[tuple[int, float]], threshold: float) -> list[tuple[int, float]]:
    """The tokens at or below the threshold, or the likeliest one."""
    return [pair for pair in own if pair[1] <= threshold] or [min(own, key=lambda pair: pair[1])]


def test_tokens_above_the_threshold_are_masked_but_never_all_of_a_response(text_model: Path, tmp_path: Path) -> None:
    losses = losses_of(experiment(text_model, tmp_path, None))
    every = sorted(loss for row in losses for _, loss in row)
    threshold = (every[len(every) // 3 - 1] + every[len(every) // 3]) / 2
    config = experiment(text_model, tmp_path, threshold)
    model, source = load_model(config.model, "fp32"), open_source(config.task, "task")  # type: ignore[arg-type]
    features = [model.preprocess_task(sample) for sample in source]
    mask = TokenMask(model, features.__getitem__, len(features), threshold, 3, OneWorker())
    kept = 0
    for row, own in enumerate(losses):
        expected = [place for place, _ in learnt_of(own, threshold)]
        assert list(mask(row, features[row]).layout.predicted) == expected
        kept += len(expected)
    assert 0 < mask.masked == len(every) - kept
    assert mask.tokens == len(every)

    nothing = TokenMask(model, features.__getitem__, len(features), 0.0, 3, OneWorker())
    assert [len(nothing(row, one).layout.predicted) for row, one in enumerate(features)] == [1] * len(features)


def test_the_teachers_pass_over_the_task_reports_how_far_it_is(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("craft_ray.pace.SAY_S", 0.0)
    reached: list[tuple[str, float, int]] = []

    class Bars(NullObserver):
        def progress(self, what: str, done: float, total: int, left_s: float) -> None:
            reached.append((what, done, total))

    config = experiment(text_model, tmp_path, 1.0).changed({"train.batch_size": 3})
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    Run(config, folder, OneWorker(), Bars()).close()
    assert reached == [("masking tokens by the teacher's loss", done, 8) for done in (3, 6, 8)]


def test_a_run_learns_the_other_tokens_alone_and_resumes_with_the_same_mask(text_model: Path, tmp_path: Path) -> None:
    losses = losses_of(experiment(text_model, tmp_path, None))
    every = [loss for row in losses for _, loss in row]
    threshold = sum(every) / len(every)
    config = experiment(text_model, tmp_path, threshold)
    whole = trained(config, tmp_path / "whole")
    learnt = [loss for row in losses for _, loss in learnt_of(row, threshold)]
    assert len(learnt) < len(every)
    assert whole.read_metrics()[0]["train/loss"] == pytest.approx(sum(learnt) / len(learnt), rel=1e-5)

    folder = RunFolder(tmp_path / "cut")
    folder.begin(config, ["test"])
    first = Run(config, folder, OneWorker(), NullObserver())
    first.loop(until=2)
    first.close()
    second = trained(config, folder.path)
    assert [r["train/loss"] for r in second.read_metrics()] == [r["train/loss"] for r in whole.read_metrics()]
