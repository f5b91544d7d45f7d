"""`train.optimizer: policy`: what a policy's own config prescribes, as LeRobot's factory builds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lerobot")

from lerobot.optim import MultiAdamConfig
from lerobot.optim.factory import make_optimizer_and_scheduler

from craft_ray.config import Experiment, dump_config, parse_config
from craft_ray.errors import ConfigError
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.optimization import seed_step
from craft_ray.run.training import Run
from craft_ray.workers import OneWorker
from tests.support.robots import small_policy, write_dataset
from tests.support.robots_others import small_act

STEPS = 4
PRESETS: dict[str, dict[str, Any]] = {
    "pi0_fast": {
        "optimizer_lr": 3e-3, "optimizer_betas": [0.8, 0.9], "optimizer_eps": 1e-6, "optimizer_weight_decay": 0.2,
        "optimizer_grad_clip_norm": 0.5, "scheduler_warmup_steps": 1, "scheduler_decay_steps": 3,
        "scheduler_decay_lr": 1e-4,
    },
    "act": {"optimizer_lr": 2e-3, "optimizer_lr_backbone": 1e-4, "optimizer_weight_decay": 0.3},
}  # fmt: skip
MAKERS: dict[str, Callable[[Path], Path]] = {"pi0_fast": small_policy, "act": small_act}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies whose config.json prescribes something else than the defaults, and data. Read-only."""
    root = tmp_path_factory.mktemp("presets")
    for kind, make in MAKERS.items():
        prescribe(make(root / kind), PRESETS[kind])
    write_dataset(root / "small", episodes=2, cameras=("camera0",), task="open the drawer")
    write_dataset(root / "large", episodes=2, cameras=("camera0",), task="open the drawer", size=64)
    return root


def prescribe(policy: Path, settings: dict[str, Any]) -> None:
    path = policy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def experiment(world: Path, kind: str, changes: dict[str, Any] | None = None) -> Experiment:
    tree = {
        "output_dir": str(world / "runs"),
        "model": {"kind": "lerobot", "path": str(world / kind)},
        "task": {"path": str(world / ("large" if kind == "act" else "small"))},
        "craft": {"enabled": False},
        "train": {"steps": STEPS, "batch_size": 4, "optimizer": "policy", "checkpoint_every": 2},
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test").changed(changes or {})


def opened(config: Experiment, folder: Path) -> Run:
    return Run(config, RunFolder(folder), OneWorker(torch.device("cpu")), NullObserver())


def parameters(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.gradients.parameters]


@pytest.mark.parametrize("kind", MAKERS)
def test_steps_are_those_of_lerobots_optimiser_and_schedule(world: Path, tmp_path: Path, kind: str) -> None:
    config = experiment(world, kind)
    with closing(opened(config, tmp_path / "ours")) as ours, closing(opened(config, tmp_path / "theirs")) as theirs:
        start = parameters(ours)
        policy: Any = theirs.model.module
        settings = policy.config
        plan = SimpleNamespace(
            use_policy_training_preset=True,
            optimizer=settings.get_optimizer_preset(),
            scheduler=settings.get_scheduler_preset(),
            steps=STEPS,
        )
        optimizer, scheduler = make_optimizer_and_scheduler(plan, policy)  # type: ignore[arg-type]
        assert isinstance(optimizer, torch.optim.Optimizer)
        rates = []
        for step in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            seed_step(config.seed, step, 0)
            (batch,) = theirs.task.batches(step)
            optimizer.zero_grad()
            theirs.model.task_loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), plan.optimizer.grad_clip_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        ours.loop()
        for key in ("betas", "eps", "weight_decay"):
            assert [g[key] for g in ours.optimizer.param_groups] == [g[key] for g in optimizer.param_groups]
        assert [r["train/lr"] for r in ours.folder.read_metrics()] == rates
        assert rates[0] != rates[-1] if kind == "pi0_fast" else rates == [PRESETS["act"]["optimizer_lr"]] * STEPS
        torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=0, atol=1e-6)
        assert any(not torch.equal(one, first) for one, first in zip(parameters(ours), start, strict=True))


def test_resumes_bit_for_bit_and_only_with_its_own_preset(world: Path, tmp_path: Path) -> None:
    config = experiment(world, "pi0_fast")
    with closing(opened(config, tmp_path / "whole")) as whole:
        whole.loop()
        final = parameters(whole)
    with closing(opened(config, tmp_path / "parts")) as run:
        run.loop(until=2)
    with closing(opened(config, tmp_path / "parts")) as run:
        assert run.step == 2
        run.loop()
        assert all(torch.equal(one, other) for one, other in zip(parameters(run), final, strict=True))

    path = world / "pi0_fast" / "config.json"
    before = path.read_text()
    prescribe(world / "pi0_fast", {"scheduler_decay_lr": 1e-5})
    try:
        with pytest.raises(ConfigError, match="another preset"):
            opened(config, tmp_path / "parts")
    finally:
        path.write_text(before)


def test_an_adapter_alone_is_optimised(world: Path, tmp_path: Path) -> None:
    config = experiment(world, "pi0_fast", {"adapter.r": 2})
    with closing(opened(config, tmp_path / "run")) as run:
        optimised = [p for group in run.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in optimised} == {id(p) for p in run.gradients.parameters}


def test_a_preset_of_another_optimiser_is_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.policies.act.configuration_act import ACTConfig

    monkeypatch.setattr(ACTConfig, "get_optimizer_preset", lambda _: MultiAdamConfig())
    with pytest.raises(ConfigError, match=r"MultiAdamConfig.*train\.optimizer=adamw"):
        opened(experiment(world, "act"), tmp_path / "run")


def test_what_the_policy_decides_is_not_written_down(world: Path) -> None:
    """The config of a run names no rate that was not used, and reads back as an equal one."""
    config = experiment(world, "act")
    written = yaml.safe_load(dump_config(config))["train"]
    assert not [key for key in ("learning_rate", "max_grad_norm") if key in written]
    assert config.changed({}) == config
    assert config.changed({"train.optimizer": "adamw"}).train.learning_rate == 1e-4
