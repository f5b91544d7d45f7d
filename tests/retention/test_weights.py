"""Retention modes `l2_sp` and `ewc`: distances of weights, under a fixed multiplier or a budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from craft_ray.anchors.reader import open_anchors
from craft_ray.config import Experiment
from craft_ray.errors import ConfigError
from craft_ray.models import load_model
from craft_ray.models.base import IGNORE
from craft_ray.retention.constraints import open_mode
from craft_ray.retention.ewc import EWC
from craft_ray.retention.l2_sp import L2SP
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run
from craft_ray.workers import OneWorker
from tests.support.caches import built, prompts, teacher, text_experiment
from tests.support.runs import trained

BUDGET = {"craft.retention_mode": "l2_sp", "craft.epsilon_start": 0.01, "craft.anchor_cache_dir": None}


def experiment(model: Path, folder: Path, mode: str, **changes: object) -> Experiment:
    settings = {
        "craft.retention_mode": mode,
        "craft.epsilon_start": 0.01,
        "train.steps": 4,
        "anchors.modes": ["token_ce"],
    }
    source = prompts(folder / "a.jsonl", [4, 9, 2, 7, 12, 3, 5, 8])
    return text_experiment(model, source, folder, settings | {"train.learning_rate": 1e-2} | changes)


def test_l2_sp_is_half_the_squared_distance_and_needs_no_anchors(text_model: Path, tmp_path: Path) -> None:
    config = experiment(text_model, tmp_path, "l2_sp", **{"craft.anchor_cache_dir": None, "anchors": None})
    model = teacher(config)
    mode = open_mode(config, model, model.weights_fingerprint())
    assert isinstance(mode, L2SP)
    mode.check_untouched([0], 1)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.5)
    batch = mode.batch([0])
    count = sum(p.numel() for p in model.module.parameters())
    loss = mode.loss(batch)
    assert loss.item() == pytest.approx(0.125 * count, rel=1e-5)
    loss.backward()
    for parameter in model.module.parameters():
        assert torch.allclose(parameter.grad, torch.tensor(0.5))  # type: ignore[arg-type]

    result = trained(config, tmp_path / "run").finished()
    assert result is not None
    assert (result["retention_mode"], result["heldout_anchors"], result["cache"]) == ("l2_sp", 0, None)
    last = load_model(config.model, "fp32", weights=str(tmp_path / "run" / "checkpoints" / "last" / "model"))
    pairs = zip(last.module.parameters(), teacher(config).module.parameters(), strict=True)
    distance = sum(float((ours - theirs).square().sum()) for ours, theirs in pairs) / 2
    assert result["retention_loss"] == pytest.approx(distance, rel=1e-4)


def test_ewc_weighs_the_distance_by_the_fisher_information_of_drawn_tokens(text_model: Path, tmp_path: Path) -> None:
    config = experiment(text_model, tmp_path, "ewc", **{"anchors.max_new_tokens": 8})
    built(config)
    model = teacher(config)
    mode = open_mode(config, model, model.weights_fingerprint())
    assert isinstance(mode, EWC)
    assert all((diagonal >= 0).all() for diagonal in mode.fisher)
    again = open_mode(config, model, model.weights_fingerprint())
    assert isinstance(again, EWC)
    assert all(map(torch.equal, mode.fisher, again.fisher)), "the draws are the same in every run"

    with torch.no_grad():
        for parameter in mode.parameters:
            parameter.add_(0.1)
    expected = sum(0.5 * 0.01 * float(diagonal.double().sum()) for diagonal in mode.fisher)
    assert mode.loss(mode.batch([0])).item() == pytest.approx(expected, rel=1e-4)


def test_the_pass_for_the_fisher_information_reports_how_far_it_is(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("craft_ray.pace.SAY_S", 0.0)
    config = experiment(text_model, tmp_path, "ewc", **{"anchors.max_new_tokens": 2})
    built(config)
    reached: list[tuple[str, float, int]] = []

    class Bars(NullObserver):
        def progress(self, what: str, done: float, total: int, left_s: float) -> None:
            reached.append((what, done, total))

    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    Run(config, folder, OneWorker(), Bars()).close()
    count = len(open_anchors(tmp_path / "anchors").split(config.craft.anchor_holdout)[0])
    assert count > 2
    assert reached == [("measuring the Fisher information on the anchors", done, count) for done in range(1, count + 1)]


def test_the_information_is_that_of_the_teachers_distribution(text_model: Path, tmp_path: Path) -> None:
    """For the weight of the last norm the expectation over the drawn tokens can be written out: the sum over all tokens
    v of p_v (d log p_v / d theta)^2. Over all its entries and many places the draws average out."""
    config = experiment(text_model, tmp_path, "ewc", **{"anchors.max_new_tokens": 8})
    built(config)
    model = teacher(config)
    mode = open_mode(config, model, model.weights_fingerprint())
    assert isinstance(mode, EWC)
    suffixes = open_mode(config.changed({"craft.retention_mode": "token_ce", "craft.epsilon_unit": None}), model, None)
    train, _ = suffixes.split(config.craft.anchor_holdout)
    norm = model.module.base_model.norm.weight  # type: ignore[union-attr]
    exact, places = torch.zeros_like(norm), 0
    for row in train:
        batch = suffixes.batch([row]).inputs
        log_probs_TV = model.logits(batch)[batch.targets_BP != IGNORE].log_softmax(-1)  # type: ignore[attr-defined]
        every = torch.eye(log_probs_TV.shape[1])
        for log_probs_V in log_probs_TV:
            (scores_VD,) = torch.autograd.grad(log_probs_V, norm, every, retain_graph=True, is_grads_batched=True)
            exact += log_probs_V.detach().exp() @ scores_VD.square()
            places += 1
    index = next(i for i, parameter in enumerate(mode.parameters) if parameter is norm)
    assert float(mode.fisher[index].sum()) == pytest.approx(float(exact.sum()) / places, rel=0.35)


@pytest.mark.parametrize("name", ["l2_sp", "ewc"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, text_model: Path, tmp_path: Path) -> None:
    config = experiment(text_model, tmp_path, name, **{"train.checkpoint_every": 2})
    built(config)
    whole = trained(config, tmp_path / "whole")
    folder = RunFolder(tmp_path / "cut")
    folder.begin(config, ["test"])
    first = Run(config, folder, OneWorker(), NullObserver())
    first.loop(until=2)
    first.close()
    second = trained(config, folder.path)
    losses = [[record["craft/retention_loss"] for record in run.read_metrics()] for run in (whole, second)]
    assert losses[0] == losses[1]
    assert losses[0][0] == 0 < losses[0][1]


def test_an_adapter_is_refused(text_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = experiment(text_model, tmp_path, "l2_sp", adapter={"r": 2})
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    with pytest.raises(ConfigError, match="leave the section adapter out"):
        Run(config, folder, OneWorker(), NullObserver())
