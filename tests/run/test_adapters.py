"""Runs that train an adapter: exact, resumable, on the cache of full training, compared, searched and merged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from craft_pipelines.compare import arm_config
from craft_pipelines.evaluate import evaluate, model_folder
from craft_pipelines.merge import merge
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from craft_ray.config import AdapterConfig
from craft_ray.data.sampler import StepSampler
from craft_ray.data.source import open_source
from craft_ray.errors import ConfigError, ModelError
from craft_ray.models import load_model
from craft_ray.report.settings import differences
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.optimization import learning_rate
from craft_ray.run.task_data import TASK_STREAM
from craft_ray.run.training import Run, train
from craft_ray.sweep.space import parse_space
from craft_ray.workers import OneWorker
from tests.support.experiments import Digits
from tests.support.runs import trained

LORA = {"adapter": {"r": 4}, "train.learning_rate": 1e-2}


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.checkpoints / "last" / "model" / "adapter_model.safetensors")


def test_the_baseline_equals_a_plain_peft_loop_bit_for_bit(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached, {**LORA, "craft.enabled": False})
    ours = weights(trained(config, tmp_path / "run"))

    model = load_model(config.model, "fp32")
    torch.manual_seed(config.seed)
    wrapped = get_peft_model(model.module, LoraConfig(r=4, target_modules="all-linear"))
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    source = open_source(config.task, "task")
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.train.weight_decay, fused=True)
    sampler = StepSampler(len(source), config.train.batch_size, config.seed, TASK_STREAM)
    for step in range(config.train.steps):
        batch = model.collate([model.preprocess_task(source[row]) for row in sampler.global_batch(step)])
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.train)
        optimizer.zero_grad()
        model.task_loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    theirs = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached, {**LORA, "adapter": {"r": 4, "use_dora": True}, "train.steps": 5})
    whole = trained(config, tmp_path / "whole")
    assert whole.read_metrics()[-1]["craft/retention_loss"] > 0

    cut = RunFolder(tmp_path / "cut")
    cut.begin(config, ["test"])
    Run(config, cut, OneWorker(), NullObserver()).loop(until=3)  # past the checkpoint at 2: step 3 is repeated
    train(config, cut, OneWorker(), NullObserver())
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for key in ("retention_loss", "lambda", "feasible"):
        assert cut.finished()[key] == whole.finished()[key]


def test_a_run_merges_into_a_plain_folder(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached, {**LORA, **digits.scored(limit=8), "train.steps": 3})
    run = trained(config, tmp_path / "run")
    said: list[str] = []
    merge(run.path, tmp_path / "merged", said.append)
    assert str(tmp_path / "merged") in said[0]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")

    source = open_source(config.task, "task")
    unmerged = load_model(config.model, "fp32", weights=str(model_folder(run.path)))
    plain = load_model(config.model, "fp32", weights=str(tmp_path / "merged"))
    base = load_model(config.model, "fp32")
    batch = base.collate([base.preprocess_task(source[row]) for row in range(8)])
    with torch.inference_mode():
        losses = [float(model.task_loss(batch)) for model in (base, unmerged, plain)]
    assert abs(losses[1] - losses[0]) > 1e-3
    assert losses[2] == pytest.approx(losses[1], abs=1e-5)

    scored = evaluate(config, [run.path, tmp_path / "merged"], None, said.append)
    assert scored[1].scores["new"].value == run.finished()["new"]["after"]
    assert len({model.weights for model in scored}) == 3

    with pytest.raises(ConfigError, match="exists"):
        merge(run.path, tmp_path / "merged")
    full = trained(digits.experiment(cached, {"train.steps": 2}), tmp_path / "full")
    with pytest.raises(ConfigError, match="trained no adapter"):
        merge(full.checkpoints / "step_000002", tmp_path / "other")
    with pytest.raises(ConfigError, match="neither a run"):
        merge(tmp_path, tmp_path / "other")


def test_a_run_does_not_resume_on_another_teacher(digits: Digits, cached: Path, tmp_path: Path) -> None:
    config = digits.experiment(cached, {**LORA, "train.steps": 3, "craft.enabled": False})
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    Run(config, folder, OneWorker(), NullObserver()).loop(until=2)
    base = folder.checkpoints / "last" / "model" / "base_model.json"
    base.write_text(json.dumps({"weights": "0" * 32}))
    with pytest.raises(ConfigError, match="trained on weights with the hash 0000"):
        Run(config, folder, OneWorker(), NullObserver())


def test_an_adapter_that_no_loss_depends_on_is_refused(digits: Digits, cached: Path, tmp_path: Path) -> None:
    """The output of the block before the last does not depend on the last block."""
    last = json.loads((digits.model / "config.json").read_text())["text_config"]["num_hidden_layers"] - 1
    only_last = rf".*language_model\.layers\.{last}\.mlp\.down_proj"
    changes = {"adapter": {"target_modules": only_last}, "craft.layers": [-2]}
    with pytest.raises(ModelError, match="retention loss depends on no weight that is trained"):
        trained(digits.experiment(cached, changes), tmp_path / "run")


def test_arms_with_and_without_an_adapter(digits: Digits, tmp_path: Path) -> None:
    variants = {"full": {"adapter": None}, "small": {"adapter": {"r": 2}, "epsilon_start": 0.5}, "same": {}}
    config = digits.experiment(tmp_path, {"adapter": {"r": 16}, "compare.variants": variants})
    arms = ["baseline", *variants]
    runs = {arm: arm_config(config, arm, 0, tmp_path, arms) for arm in arms}
    assert {arm: None if run.adapter is None else run.adapter.r for arm, run in runs.items()} == {
        "baseline": 16, "full": None, "small": 2, "same": 16,
    }  # fmt: skip
    assert runs["small"].craft.epsilon_start == 0.5
    finished: Any = [SimpleNamespace(arm=arm, config=run) for arm, run in runs.items()]
    shown = {difference.key: difference.values for difference in differences(finished)}
    assert shown["adapter"] == ("lora, r 16", "null", "lora, r 2", "lora, r 16")
    fresh = digits.experiment(tmp_path, {"compare.variants": {"low": {"adapter": {}}}})
    assert arm_config(fresh, "low", 0, tmp_path, ["low"]).adapter == AdapterConfig()
    assert arm_config(fresh, "baseline", 0, tmp_path, ["baseline"]).adapter is None
    with pytest.raises(ConfigError, match=r"compare.variants.low: adapter.r: .*greater than or equal to 1"):
        digits.experiment(tmp_path, {"compare.variants": {"low": {"adapter": {"r": 0}}}})


def test_a_sweep_searches_the_rank(digits: Digits, tmp_path: Path) -> None:
    config = digits.experiment(tmp_path, {"adapter": {"r": 4}})
    space = parse_space({"adapter.r": {"grid": [2, 8]}}, "test")
    ranks = [config.changed(space.draw(config, 0, number)).adapter for number in range(2)]
    assert [adapter.r for adapter in ranks if adapter] == [2, 8]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 0}, "adapter.r: .*greater than or equal to 1"),
        ({"dropout": 0.1}, "model.disable_dropout turns dropout off"),
        ({"kind": "ia3"}, "adapter.kind: "),
        ({"lora_alpha": 8}, "unknown key adapter.lora_alpha; did you mean adapter.alpha"),
        ({"init": "pissa"}, "adapter.init: "),
    ],
)
def test_settings_that_are_refused(settings: dict, says: str, digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        digits.experiment(tmp_path, {"adapter": settings})
    assert error.value.exit_code == 2
    assert "\n" not in error.value.message
