"""CRaFT's step inside LeRobot's own training loop, which is otherwise left as it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("lerobot")

import lerobot.scripts.lerobot_train as loop
from craft_pipelines.anchors import build
from lerobot.configs.default import DatasetConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from safetensors.torch import load_file

from craft_ray.config import Experiment, ModelConfig, parse_config
from craft_ray.errors import CacheRefused, ConfigError
from craft_ray.lerobot.hook import CraftUpdate, craft_updates
from craft_ray.lerobot.size import sized
from craft_ray.models import load_model
from tests.support.robots import small_policy, write_dataset

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, the data of its old and of a new skill, and a cache of each sort of anchors. Shared."""
    root = tmp_path_factory.mktemp("world")
    small_policy(root / "teacher")
    write_dataset(root / "old", episodes=2, cameras=("camera0",), task="close the drawer")
    write_dataset(root / "new", episodes=2, cameras=("camera0",), task="open the drawer", seed=1)
    build(experiment(root), say=lambda _: None)
    return root


def experiment(world: Path, changes: dict[str, Any] | None = None) -> Experiment:
    tree = {
        "output_dir": str(world / "runs"),
        "model": {"kind": "lerobot", "path": str(world / "teacher")},
        "task": {"path": str(world / "new")},
        "anchors": {
            "source": {"path": str(world / "old")},
            "modes": ["hidden", "token_ce"],
            "positions": ["suffix"],
            "layers": [-1],
            "max_new_tokens": 12,
        },
        "craft": {
            "anchor_cache_dir": str(world / "anchors"),
            "anchor_batch_size": 4,
            "initial_lambda": 0.5,
            "lambda_lr": 0.1,
            "epsilon_start": 1e-9,
        },
        "train": {"steps": STEPS},
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test").changed(changes or {})


@pytest.fixture(autouse=True)
def own_logging(world: Path) -> Iterator[None]:
    """LeRobot's loop sets up logging for the process, and its policy is a small one."""
    handlers, level = logging.root.handlers[:], logging.root.level
    with sized(world / "teacher"):
        yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def lerobots_run(world: Path, output: Path, data: str = "new", **changes: Any) -> Path:
    """LeRobot's own `train`, as its command line calls it; the folder of its last checkpoint."""
    settings = PreTrainedConfig.from_pretrained(world / "teacher")
    settings.pretrained_path = world / "teacher"
    settings.device = "cpu"
    how: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "log_freq": 2, "seed": 3} | changes
    config = TrainPipelineConfig(
        dataset=DatasetConfig(repo_id="new", root=str(world / data)),
        policy=settings,
        output_dir=output,
        num_workers=0,
        env_eval_freq=0,
        save_freq=0,
        **how,
    )
    loop.train(config)
    [checkpoint] = [path for path in (output / "checkpoints").iterdir() if not path.is_symlink()]
    return checkpoint / "pretrained_model"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def crafted(world: Path, output: Path, changes: dict[str, Any] | None = None) -> tuple[Path, CraftUpdate]:
    with craft_updates(experiment(world, changes)) as update:
        return lerobots_run(world, output), update


def distance(one: Path, other: Path) -> float:
    """The largest difference of two weights."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_every_step_is_crafts(world: Path, tmp_path: Path) -> None:
    """The first L_ret is the storage's rounding, then the budget is exceeded, and lambda rises."""
    student, update = crafted(world, tmp_path / "run")
    records = update.records
    assert len(records) == STEPS
    names = {"task_loss", "retention_loss", "lambda", "epsilon", "dot", "cos"}
    assert all(record.keys() == names for record in records)
    assert records[0]["retention_loss"] < 1e-6
    assert records[-1]["retention_loss"] > 1e-6
    assert all(np.isfinite(record["task_loss"]) for record in records)
    assert all(np.isfinite(record["dot"]) for record in records[1:])
    assert all(-1 <= record["cos"] <= 1 for record in records[1:])
    lambdas = [record["lambda"] for record in records]
    assert lambdas[0] == 0.5
    assert lambdas == sorted(lambdas)
    assert lambdas[-1] > lambdas[0]
    assert distance(student, world / "teacher") > 0


def test_lambda_falls_while_there_is_room(world: Path, tmp_path: Path) -> None:
    _, update = crafted(world, tmp_path / "run", {"craft.epsilon_start": 10.0})
    lambdas = [record["lambda"] for record in update.records]
    assert lambdas == sorted(lambdas, reverse=True)
    assert lambdas[-1] < lambdas[0]
    assert all(record["epsilon"] == 10.0 for record in update.records)


def test_tokens_are_retained_as_well(world: Path, tmp_path: Path) -> None:
    _, update = crafted(world, tmp_path / "run", {"craft.retention_mode": "token_ce"})
    assert all(record["retention_loss"] > 0.1 for record in update.records)


def test_between_retention_steps_only_the_task_is_learnt(world: Path, tmp_path: Path) -> None:
    _, update = crafted(world, tmp_path / "run", {"craft.retention_freq": 3})
    measured = [np.isfinite(record["retention_loss"]) for record in update.records]
    assert measured == [True, False, False, True, False, False]


def test_a_strong_constraint_holds_the_policy_back(world: Path, tmp_path: Path) -> None:
    plain = lerobots_run(world, tmp_path / "plain")
    held, _ = crafted(world, tmp_path / "held", {"craft.initial_lambda": 10.0})
    config = experiment(world)
    losses = [_retention(config, folder) for folder in (plain, held)]
    assert losses[1] < losses[0]


def _retention(config: Experiment, folder: Path) -> float:
    from craft_ray.retention.constraint import mean_loss, open_mode
    from craft_ray.workers import OneWorker

    model = load_model(config.model, "fp32", weights=str(folder))
    return mean_loss(open_mode(config, model, None), range(12), 4, OneWorker())


def test_the_teachers_statistics_stay_and_the_checkpoint_is_a_teacher(world: Path, tmp_path: Path) -> None:
    """LeRobot itself puts those of the new data in their place."""
    plain = lerobots_run(world, tmp_path / "plain")
    student, _ = crafted(world, tmp_path / "run")
    for which in ("pre", "post"):
        name = f"policy_{which}processor_step_*_*normalizer_processor.safetensors"
        teachers, ours, theirs = (load_file(next(folder.glob(name))) for folder in (world / "teacher", student, plain))
        for key in ("observation.state.min", "action.max"):
            if key in teachers:
                assert torch.equal(ours[key], teachers[key])
                assert not torch.equal(theirs[key], teachers[key])
    again = load_model(ModelConfig(kind="lerobot", path=str(student)), "fp32")
    state = again.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights(student).items())
    before = load_model(experiment(world).model, "fp32")
    assert again.preprocessor_fingerprint() == before.preprocessor_fingerprint()


def test_without_a_multiplier_it_is_lerobots_own_step(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Closely: gradients of one pass are the same, and are clipped by a norm that is added up in another order."""
    off = {"craft.initial_lambda": 0.0, "craft.lambda_lr": 0.0, "craft.use_grad_projection": False}
    student, update = crafted(world, tmp_path / "run", off)
    assert all(record["lambda"] == 0 for record in update.records)
    monkeypatch.setattr(loop, "make_pre_post_processors", keeping_statistics)
    plain = lerobots_run(world, tmp_path / "plain")
    moved = distance(plain, world / "teacher")
    assert moved > 1e-5
    assert distance(student, plain) < 0.02 * moved  # the sign of a gradient of nearly zero decides Adam's step


def keeping_statistics(**arguments: Any) -> Any:
    from lerobot.policies import make_pre_post_processors

    for overrides, step in (("preprocessor_overrides", "normalizer"), ("postprocessor_overrides", "unnormalizer")):
        arguments[overrides][f"{step}_processor"].pop("stats")
    return make_pre_post_processors(**arguments)


def test_lerobots_loop_is_untouched_outside(world: Path, tmp_path: Path) -> None:
    """Bit for bit, also after the context was left by an error."""
    own = loop.update_policy, loop.make_pre_post_processors
    first = lerobots_run(world, tmp_path / "first")
    with craft_updates(experiment(world)):
        assert loop.update_policy is not own[0]
    with pytest.raises(KeyError), craft_updates(experiment(world)):
        raise KeyError
    assert (loop.update_policy, loop.make_pre_post_processors) == own
    second = lerobots_run(world, tmp_path / "second")
    assert distance(first, second) == 0


def test_what_is_measured_stands_in_lerobots_log(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Means over the steps at which it was measured."""
    crafted(world, tmp_path / "run", {"craft.retention_freq": 2})
    captured = capfd.readouterr()
    [*_, last] = [line for line in (captured.out + captured.err).splitlines() if "step:" in line]
    for name in ("loss", "grdn", "retention_loss", "lambda", "epsilon"):
        assert f"{name}:" in last
    assert "nan" not in last


def refused(world: Path, output: Path, kind: type[Exception], said: str, changes: dict[str, Any]) -> None:
    """One line before the first update: no weight is written."""
    with craft_updates(experiment(world, changes)) as update, pytest.raises(kind, match=said) as told:
        lerobots_run(world, output)
    assert update.records == []
    assert "\n" not in str(told.value)
    assert not (output / "checkpoints").exists()


def test_a_cache_of_another_teacher_is_refused(world: Path, tmp_path: Path) -> None:
    small_policy(tmp_path / "teacher", seed=1)
    (tmp_path / "old").symlink_to(world / "old")
    build(experiment(tmp_path), say=lambda _: None)
    cache = {"craft.anchor_cache_dir": str(tmp_path / "anchors")}
    refused(
        world, tmp_path / "run", CacheRefused, r"another teacher \(hash of its weights\): cache .*, this run", cache
    )


def test_a_cache_that_lacks_the_layer_is_refused(world: Path, tmp_path: Path) -> None:
    refused(world, tmp_path / "run", CacheRefused, "holds layers 2, this run asks for 1", {"craft.layers": [1]})


def test_a_model_path_of_another_type_is_refused(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"type": "act"}))
    said = "holds a act, the policy in training is a pi0_fast"
    refused(world, tmp_path / "run", ConfigError, said, {"model.path": str(other)})


def test_what_the_loop_does_not_do_is_refused_at_once(world: Path) -> None:
    for changes, said in (
        ({"craft.enabled": False}, "needs craft.enabled"),
        ({"craft.anchor_cache_dir": None}, "craft.anchor_cache_dir: build a cache"),
        ({"model.merge_statistics": [str(world / "new")]}, "model.merge_statistics"),
    ):
        own = loop.update_policy
        with pytest.raises(ConfigError, match=said) as told, craft_updates(experiment(world, changes)):
            raise AssertionError("it was not refused")
        assert "\n" not in str(told.value)
        assert loop.update_policy is own
