"""An adapter in a LeRobot policy: in LeRobot's own PEFT form, and merged into a plain policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

from craft_pipelines.anchors import build
from craft_pipelines.merge import merge
from lerobot.policies.factory import get_policy_class
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from craft_ray.config import AdapterConfig, ModelConfig, parse_config
from craft_ray.data.frame import Frame
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError
from craft_ray.lerobot.policy import LeRobotPolicy
from craft_ray.lerobot.size import sized
from craft_ray.models import adapting, load_model
from craft_ray.models.adapter import WEIGHTS
from craft_ray.models.base import Batch
from craft_ray.models.dropout import disable_dropout
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train
from craft_ray.workers import OneWorker
from tests.support.hubs import fetched
from tests.support.robots import TASKS, small_policy, smooth_chunks, write_dataset
from tests.support.robots_others import small_act, small_pi05, small_pi05_sizes, small_smolvla


@pytest.fixture(autouse=True)
def pi05_is_small() -> Iterator[None]:
    with small_pi05_sizes():
        yield


def policy(path: Path, weights: Path | None = None) -> LeRobotPolicy:
    config = ModelConfig(kind="lerobot", path=str(path))
    model = load_model(config, "fp32", weights=None if weights is None else str(weights))
    assert isinstance(model, LeRobotPolicy)
    return model


def batch_of(model: LeRobotPolicy) -> Batch:
    random = np.random.default_rng(0)
    _, height, width = model.features["observation.images.camera0"]
    pictures = {"observation.images.camera0": random.integers(0, 256, (height, width, 3), np.uint8)}
    state = {"observation.state": random.uniform(-1, 1, 4).astype(np.float32)}
    frame = Frame(pictures, state, smooth_chunks(1)[0])
    return model.collate([model.preprocess_task(Sample("a", TASKS[0], frame=frame))])


def loss(model: LeRobotPolicy, of: Any = None) -> float:
    torch.manual_seed(3)
    with torch.no_grad():
        batch = batch_of(model)
        return float(model.task_loss(batch) if of is None else of.forward(model.inputs(batch))[0])


MAKERS: dict[str, Any] = {
    "act": small_act,
    "pi0_fast": small_policy,
    "pi05": small_pi05,
    "smolvla": lambda folder: small_smolvla(folder, train_expert_only=False),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_folder_is_lerobots_own_and_merges(kind: str, tmp_path: Path) -> None:
    base = MAKERS[kind](tmp_path / "base")
    model = policy(base)
    plain = loss(model)
    teacher = model.weights_fingerprint()
    frozen = {name for name, p in model.module.named_parameters() if not p.requires_grad}
    adapting.attach(model, AdapterConfig(r=2), model.config, teacher)
    assert loss(model) == plain, "the untouched student is the teacher"
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            assert not parameter.requires_grad or name.split(".lora_")[0] + ".weight" not in frozen
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = loss(model)
    assert abs(expected - plain) > 1e-4
    model.save(tmp_path / "saved")

    # as LeRobot's make_policy does for use_peft
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["use_peft"] is True
    found = PeftConfig.from_pretrained(tmp_path / "saved")
    with sized(base):
        theirs = get_policy_class(kind).from_pretrained(found.base_model_name_or_path)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "saved", config=found, is_trainable=True)
    disable_dropout(theirs.train())
    assert loss(model, theirs.get_base_model()) == expected

    again = policy(base, tmp_path / "saved")
    assert loss(again) == expected
    assert again.adapter is not None
    assert again.adapter.base == teacher

    adapting.merge(model)
    assert {name for name, p in model.module.named_parameters() if not p.requires_grad} == frozen
    model.save(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["use_peft"] is False
    for merged in (policy(tmp_path / "merged"), policy(tmp_path / "saved")):
        assert loss(merged) == pytest.approx(expected, rel=1e-4)
        assert merged.weights_fingerprint() == model.weights_fingerprint()


def test_an_adapter_on_the_hub_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy(small_act(tmp_path / "base"))
    adapting.attach(model, AdapterConfig(r=2), model.config, "-")
    model.save(tmp_path / "saved")
    name = fetched("somebody/adapter", tmp_path / "saved", tmp_path / "hub", monkeypatch)
    with pytest.raises(
        ConfigError, match=r"model\.path somebody/adapter is an adapter on the hub: download it"
    ) as error:
        load_model(ModelConfig(kind="lerobot", path=name), "fp32")
    assert "\n" not in error.value.message


def test_an_adapter_that_cannot_keep_anything_is_refused(tmp_path: Path) -> None:
    model = policy(MAKERS["smolvla"](tmp_path / "base"))
    expert = AdapterConfig(target_modules=r".*lm_expert\..*q_proj")
    adapting.attach(model, expert, model.config, "-")
    with pytest.raises(ConfigError, match="no adapter is in the part of this smolvla that reads the prompt"):
        model.check_anchors(["hidden"], ["all"])


def test_a_run_resumes_bit_for_bit_on_the_cache_of_full_training(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", 2, 6, 64, ("camera0",), task=TASKS)
    tree = {
        "model": {"kind": "lerobot", "path": str(small_act(tmp_path / "base"))},
        "task": {"path": str(data)},
        "anchors": {"source": {"path": str(data)}, "modes": ["hidden"], "positions": ["all"]},
        "craft": {"anchor_cache_dir": str(tmp_path / "anchors"), "anchor_batch_size": 4, "anchor_holdout": 0.25},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 1},
        "workers": {"num_workers": 0},
    }
    build(parse_config(tree, "test"), say=lambda _: None)
    config = parse_config({**tree, "adapter": {"r": 2}}, "test")
    weights = []
    for name, cut in (("whole", None), ("cut", 2)):
        folder = RunFolder(tmp_path / "runs" / name)
        folder.begin(config, ["test"])
        if cut is not None:
            Run(config, folder, OneWorker(), NullObserver()).loop(until=cut)
        train(config, folder, OneWorker(), NullObserver())
        weights.append(load_file(folder.checkpoints / "last" / "model" / WEIGHTS))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(tensor.any() for name, tensor in weights[0].items() if "lora_B" in name)

    merge(folder.path, tmp_path / "merged", lambda _: None)
    plain, adapted = policy(tmp_path / "merged"), policy(tmp_path / "base", folder.checkpoints / "last" / "model")
    assert plain.adapter is None
    assert loss(plain) == pytest.approx(loss(adapted), rel=1e-4)
    assert loss(plain) != pytest.approx(loss(policy(tmp_path / "base")), rel=1e-3)
