"""Retention mode `replay`: with a fixed multiplier it is training on both losses together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.reader import open_anchors
from craft_ray.anchors.show import describe
from craft_ray.data.sampler import StepSampler
from craft_ray.data.source import open_source
from craft_ray.errors import CacheRefused, ConfigError
from craft_ray.method.surgery import clip_factor
from craft_ray.models import load_model
from craft_ray.retention.constraint import ANCHOR_STREAM
from craft_ray.retention.constraints import open_mode
from craft_ray.run.optimization import learning_rate, make_optimizer
from tests.support.caches import built, cache_folder, json_lines, prompts, teacher, text_experiment
from tests.support.runs import trained

LAMBDA = 0.7
ANSWERED = {"id": "id", "response": "response"}
FIXED = {
    "craft.retention_mode": "replay",
    "craft.epsilon_start": 1.0,
    "craft.initial_lambda": LAMBDA,
    "craft.lambda_lr": 0.0,
    "craft.lambda_floor": 0.0,
    "craft.use_grad_projection": False,
}


def experiment(model: Path, folder: Path, **changes: object):
    rows = [{"id": f"a{i}", "prompt": "abcdef"[: i % 5 + 1], "response": str(i) * (i % 3 + 1)} for i in range(20)]
    source = json_lines(folder / "a.jsonl", rows)
    settings = {
        "anchors.modes": ["hidden", "replay"],
        "anchors.source": {"path": str(source), "columns": ANSWERED},
        "train.steps": 5,
        "train.learning_rate": 1e-3,
        **FIXED,
    }
    task = prompts(folder / "task.jsonl", [4, 9, 2, 7, 12, 3])
    return text_experiment(model, task, folder, settings | changes)


@pytest.mark.parametrize("log_angle", [False, True])
def test_a_run_equals_a_hand_written_loop_over_the_sum_of_both_losses(
    log_angle: bool, text_model: Path, tmp_path: Path
) -> None:
    config = experiment(text_model, tmp_path, **{"craft.log_angle": log_angle})
    assert config.anchors is not None
    built(config)
    run = trained(config, tmp_path / "run")
    student = load_model(config.model, "fp32", weights=str(run.path / "checkpoints" / "last" / "model"))

    model = load_model(config.model, "fp32")
    task, anchors = open_source(config.task, "task"), open_source(config.anchors.source, "anchors.source")
    folder = cache_folder(config)
    kept, _ = open_anchors(folder, read_manifest(folder)).split(config.craft.anchor_holdout)
    optimizer = make_optimizer(list(model.module.parameters()), config.train)
    order = StepSampler(len(task), config.train.batch_size, config.seed, 0)
    replayed = StepSampler(len(kept), config.craft.anchor_batch_size, config.seed, ANCHOR_STREAM)
    for step in range(config.train.steps):
        new = model.collate([model.preprocess_task(task[row]) for row in order.global_batch(step)])
        old = model.collate([model.preprocess_task(anchors[kept[row]]) for row in replayed.global_batch(step)])
        optimizer.zero_grad()
        (model.task_loss(new) + LAMBDA * model.task_loss(old)).backward()
        gradients = [p.grad for p in model.module.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for gradient in gradients:
            gradient.mul_(clip_factor(norm, config.train.max_grad_norm))
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.train)
        optimizer.step()
    for ours, theirs in zip(student.module.parameters(), model.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    result = run.finished()
    assert result is not None
    assert result["retention_mode"] == "replay"
    assert result["lambda"] == LAMBDA
    assert result["heldout_anchors"] > 0


def test_the_cache_holds_the_responses_beside_the_teachers_own_tokens(text_model: Path, tmp_path: Path) -> None:
    config = experiment(text_model, tmp_path, **{"anchors.modes": ["token_ce", "replay"]})
    assert config.anchors is not None
    built(config)
    model, folder = teacher(config), cache_folder(config)
    anchors, source = open_anchors(folder), open_source(config.anchors.source, "anchors.source")
    for row in range(len(anchors)):
        assert anchors.response(row) == model.response_tokens(source[row])  # type: ignore[attr-defined]
    assert any(anchors.response(row) != anchors.suffix(row) for row in range(len(anchors)))
    assert any(line.split()[:1] == ["response"] for line in describe(folder))


def test_what_has_no_responses_is_refused(text_model: Path, tmp_path: Path) -> None:
    config = experiment(text_model, tmp_path)
    assert config.anchors is not None
    with pytest.raises(ConfigError, match=r"anchors\.source\.columns\.response names no column"):
        built(config.changed({"anchors.source.columns.response": None}))
    built(config.changed({"anchors.modes": ["hidden"]}))
    with pytest.raises(CacheRefused, match="holds mode hidden, this run asks for replay"):
        open_mode(config, teacher(config), None)
