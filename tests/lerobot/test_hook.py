"""CRaFT's step inside LeRobot's own training loop, which is otherwise left as it is."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("lerobot")

import lerobot.scripts.lerobot_train as loop
from accelerate.utils import DistributedType
from craft_pipelines.anchors import build
from lerobot.configs.default import DatasetConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.sample_weighting import SampleWeightingConfig
from safetensors.torch import load_file

from craft_ray.config import Experiment, ModelConfig, parse_config
from craft_ray.errors import CacheRefused, ConfigError, StorageError
from craft_ray.lerobot.hook import CraftUpdate, craft_updates
from craft_ray.lerobot.hook_settings import check_settings
from craft_ray.lerobot.hook_state import state_file
from craft_ray.lerobot.size import sized
from craft_ray.lerobot.tokenizers import complete_processor_config
from craft_ray.models import load_model
from tests.support.robots import small_policy, write_dataset

STEPS = 6
REPLACED = (
    "update_policy",
    "make_pre_post_processors",
    "make_optimizer_and_scheduler",
    "compute_sampler_state",
    "cycle",
    "load_training_state",
    "save_checkpoint",
)
"""What of LeRobot's loop is another while the context is open."""


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
    how: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "log_freq": 2, "seed": 3, "save_freq": 0} | changes
    config = TrainPipelineConfig(
        dataset=DatasetConfig(repo_id="new", root=str(world / data)),
        policy=settings,
        output_dir=output,
        num_workers=0,
        env_eval_freq=0,
        **how,
    )
    loop.train(config)
    return checkpoint(output, config.steps) / "pretrained_model"


def checkpoint(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"{step:06d}"


def resumed(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    """`lerobot-train --resume` from a checkpoint, in the folder of its run."""
    settings = source / "pretrained_model" / "train_config.json"
    monkeypatch.setattr("sys.argv", ["lerobot-train", f"--config_path={settings}", "--resume=true"])
    loop.train()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def crafted(
    world: Path, output: Path, changes: dict[str, Any] | None = None, **settings: Any
) -> tuple[Path, CraftUpdate]:
    """LeRobot's `train` under CRaFT with these changes of the experiment, and these settings of LeRobot's."""
    with craft_updates(experiment(world, changes)) as update:
        return lerobots_run(world, output, **settings), update


def distance(one: Path, other: Path) -> float:
    """The largest difference of two weights."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_every_step_is_crafts(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first L_ret is the storage's rounding, then the budget is exceeded, and lambda rises."""
    messages: list[str] = []
    monkeypatch.setattr("craft_ray.lerobot.hook.logger.info", messages.append)
    student, update = crafted(world, tmp_path / "run")
    assert [line.split(":")[0] for line in messages if ":" in line] == ["Retention mode", "CRaFT is enabled"]
    records = update.records
    assert len(records) == STEPS
    names = {"task_loss", "retention_loss", "lambda", "epsilon", "dot", "cos", "weight", "projected"}
    assert all(record.keys() == names for record in records)
    assert records[0]["retention_loss"] < 1e-6
    assert records[-1]["retention_loss"] > 1e-6
    assert all(np.isfinite(record["task_loss"]) for record in records)
    assert all(np.isfinite(record["dot"]) for record in records[1:])
    assert all(-1 <= record["cos"] <= 1 for record in records[1:])
    lambdas = [record["lambda"] for record in records]
    assert lambdas[0] >= 0.5
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
    _, update = crafted(world, tmp_path / "run", {"craft.retention_mode": "token_ce", "craft.epsilon_start": 0.05})
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
    from craft_ray.retention.constraint import mean_loss
    from craft_ray.retention.constraints import open_mode
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
    off = {
        "craft.initial_lambda": 0.0, "craft.lambda_lr": 0.0, "craft.lambda_floor": 0.0,
        "craft.use_grad_projection": False,
    }  # fmt: skip
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
    own = dict(vars(loop))
    first = lerobots_run(world, tmp_path / "first")
    with craft_updates(experiment(world)):
        assert {name for name, value in vars(loop).items() if value is not own[name]} == set(REPLACED)
    with pytest.raises(KeyError), craft_updates(experiment(world)):
        raise KeyError
    assert vars(loop) == own
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


# -- accumulated batches

SURGERY = {
    "craft.epsilon_start": 3e-5,
    "craft.violation_clip": None,
    "craft.lambda_lr": 0.01,
    "craft.conflict_threshold": 1.0,
    "craft.projection_gate": "always",
}
"""The multiplier moves with L_ret and every angle is a conflict, so that each of them shows in the weights."""


def assert_same_run(records: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Within the rounding of another order of sums, and it is a run in which the constraint acts."""
    assert len(records) == len(expected) >= 3
    for name in expected[0]:
        ours, theirs = ([record[name] for record in run] for run in (records, expected))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-6, err_msg=name)
    lambdas = [record["lambda"] for record in expected]
    assert len(set(lambdas)) == len(lambdas)
    assert all(record["cos"] < 1 for record in expected[1:])


def accumulating(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """What `accelerate launch --gradient_accumulation_steps` sets."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(batches))


def test_accumulated_batches_are_one_large_batch(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Also one that lies across the end of an epoch: an epoch has twelve samples, three batches of four."""
    changes = SURGERY | {"train.steps": 4}
    whole, large = crafted(world, tmp_path / "whole", changes, steps=4, batch_size=4)
    accumulating(monkeypatch, 2)
    parts, small = crafted(world, tmp_path / "parts", changes, steps=8, batch_size=2)
    assert_same_run(small.records, large.records)
    assert distance(parts, whole) < 0.02 * distance(whole, world / "teacher")


def test_one_step_of_everything_for_all_accumulated_batches(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Of the optimiser, of the learning rate's schedule, and of the multiplier."""
    accumulating(monkeypatch, 3)
    _, update = crafted(world, tmp_path / "run", steps=6, batch_size=2)
    assert len(update.records) == 2
    assert update.records[0]["lambda"] == pytest.approx(0.5 + 0.1)
    state = checkpoint(tmp_path / "run", 6) / "training_state"
    assert json.loads((state / "scheduler_state.json").read_text())["last_epoch"] == 2
    steps = [value for name, value in load_file(state / "optimizer_state.safetensors").items() if "step" in name]
    assert steps
    assert all(float(value) == 2 for value in steps)


def test_the_steps_of_the_loop_are_whole_steps(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    accumulating(monkeypatch, 4)
    said = "count batches, of which 4 are accumulated in a step: choose multiples of 4"
    refused(world, tmp_path / "run", ConfigError, said, {}, steps=6)
    refused(world, tmp_path / "run", ConfigError, said, {}, steps=8, save_freq=2)


# -- several processes


PROCESS = """
import json, os, sys
from pathlib import Path
import lerobot.scripts.lerobot_train as loop
from craft_ray.config import load_config
from craft_ray.lerobot.hook import craft_updates
from craft_ray.lerobot.size import sized

folder = Path(sys.argv.pop(1))
config = load_config(folder / "experiment.yaml")
with sized(config.model.path), craft_updates(config) as update:
    loop.train()
(folder / f"records_{os.environ['RANK']}.json").write_text(json.dumps(update.records))
"""
"""LeRobot's own command under CRaFT."""


@pytest.fixture(scope="module")
def two(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes with two samples each, started as `accelerate launch --cpu --num_processes 2` does it.

    Returns:
        A folder with LeRobot's `run`, and what each process measured.
    """
    folder: Path = tmp_path_factory.mktemp("two")
    config = experiment(world, SURGERY | {"train.accumulate": 2})
    (folder / "experiment.yaml").write_text(config.model_dump_json())
    arguments = {
        "policy.path": world / "teacher", "policy.device": "cpu", "policy.push_to_hub": "false",
        "dataset.repo_id": "new", "dataset.root": world / "new", "output_dir": folder / "run", "num_workers": 0,
        "seed": 3, "batch_size": 2, "steps": STEPS, "save_freq": 3, "log_freq": 2, "env_eval_freq": 0,
    }  # fmt: skip
    command = [sys.executable, "-c", PROCESS, str(folder), *(f"--{name}={value}" for name, value in arguments.items())]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    logs = [folder / f"process_{rank}.log" for rank in (0, 1)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, env=os.environ | place, stdout=file, stderr=file))
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=240) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
    return folder


def measured_by(two: Path, rank: int) -> list[dict[str, float]]:
    records: list[dict[str, float]] = json.loads((two / f"records_{rank}.json").read_text())
    return records


def test_two_processes_are_one(world: Path, tmp_path: Path, two: Path) -> None:
    """On the same batches of task and anchors; and both have the same multiplier to the last bit."""
    one, update = crafted(world, tmp_path / "one", SURGERY)
    first, second = (measured_by(two, rank) for rank in (0, 1))
    for name in update.records[0]:
        np.testing.assert_array_equal(*([record[name] for record in run] for run in (first, second)))
    assert_same_run(first, update.records)
    student = checkpoint(two / "run", STEPS) / "pretrained_model"
    assert distance(student, one) < 0.02 * distance(one, world / "teacher")


def test_one_process_resumes_what_two_began(world: Path, two: Path, monkeypatch: Any) -> None:
    """The sampler of anchors and the multiplier know no number of processes; LeRobot's own order of samples does."""
    expected = measured_by(two, 0)
    with craft_updates(experiment(world, SURGERY)) as update:
        resumed(monkeypatch, checkpoint(two / "run", 3))
    assert len(update.records) == 3
    assert update.records[0]["lambda"] == pytest.approx(expected[3]["lambda"], rel=1e-3)
    assert update.records[0]["retention_loss"] == pytest.approx(expected[3]["retention_loss"], rel=1e-3)


# -- resume


@pytest.mark.parametrize("batches", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(batches: int, world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Bit for bit: weights, what was measured, and the multiplier; in the first epoch, and at the beginning of the
    second. Retention is taken every second step, and the policy draws random numbers."""
    quiet = PI0FastPolicy.forward
    monkeypatch.setattr(PI0FastPolicy, "forward", lambda *given: ((1 + torch.rand(())) * quiet(*given)[0], {}))
    accumulating(monkeypatch, batches)
    changes = {**SURGERY, "craft.retention_freq": 2, "craft.epsilon_schedule": "linear", "craft.epsilon_end": 1e-5}
    output, steps = tmp_path / "run", STEPS * batches
    student, whole = crafted(world, output, changes, batch_size=2, steps=steps, save_freq=steps // 2)
    expected = weights(student), torch.load(state_file(checkpoint(output, steps)))
    state_file(checkpoint(output, steps)).unlink()
    with craft_updates(experiment(world, changes)) as update:
        resumed(monkeypatch, checkpoint(output, steps // 2))
    np.testing.assert_equal(update.records, whole.records[STEPS // 2 :])
    assert len({record["lambda"] for record in whole.records}) == 3
    again = weights(student)
    assert all(torch.equal(again[name], value) for name, value in expected[0].items())
    np.testing.assert_equal(torch.load(state_file(checkpoint(output, steps))), expected[1])


def refused_to_resume(
    world: Path, source: Path, kind: type[Exception], said: str, monkeypatch: Any, changes: dict[str, Any]
) -> None:
    """One line before the first update."""
    with craft_updates(experiment(world, changes)) as update, pytest.raises(kind, match=said) as caught:
        resumed(monkeypatch, source)
    assert update.records == []
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_multiplier_is_refused(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """LeRobot's own, and one of CRaFT's of which the last file is missing or damaged."""
    said = "has no training_state/craft.pt: it was saved without craft_updates, or not completely"
    lerobots_run(world, tmp_path / "plain", steps=2, save_freq=1)
    complete_processor_config(checkpoint(tmp_path / "plain", 1) / "pretrained_model")
    refused_to_resume(world, checkpoint(tmp_path / "plain", 1), ConfigError, said, monkeypatch, {})
    crafted(world, tmp_path / "run", steps=2, save_freq=1)
    first = checkpoint(tmp_path / "run", 1)
    state_file(first).write_bytes(state_file(first).read_bytes()[:100])
    refused_to_resume(world, first, StorageError, "craft.pt is damaged", monkeypatch, {})
    state_file(first).unlink()
    refused_to_resume(world, first, ConfigError, said, monkeypatch, {})


def test_another_cache_or_other_steps_are_refused_on_resume(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    crafted(world, tmp_path / "run", steps=4, save_freq=2)
    first = checkpoint(tmp_path / "run", 2)
    other = {"craft.anchor_cache_dir": str(tmp_path / "anchors"), "anchors.max_new_tokens": 8}
    build(experiment(world, other), say=lambda _: None)
    said = "was trained with the anchor cache .* resume with the cache that it started with"
    refused_to_resume(world, first, CacheRefused, said, monkeypatch, other)
    accumulating(monkeypatch, 2)
    said = "accumulates gradients over 1 batch.* over 2: resume with gradient_accumulation_steps=1"
    refused_to_resume(world, first, ConfigError, said, monkeypatch, {})


def test_a_checkpoint_that_lerobot_did_not_complete_has_no_state(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Not even that of an earlier one in the same folder."""
    crafted(world, tmp_path / "run", steps=2, save_freq=1)

    def disk_full(**_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(loop, "save_checkpoint", disk_full)
    with pytest.raises(OSError, match="no space"), craft_updates(experiment(world)):
        resumed(monkeypatch, checkpoint(tmp_path / "run", 1))
    assert loop.save_checkpoint is disk_full
    assert not state_file(checkpoint(tmp_path / "run", 2)).exists()


# -- what is refused


def refused(
    world: Path, output: Path, kind: type[Exception], said: str, changes: dict[str, Any], **settings: Any
) -> None:
    """One line before the first update: no weight is written."""
    with craft_updates(experiment(world, changes)) as update, pytest.raises(kind, match=said) as caught:
        lerobots_run(world, output, **settings)
    assert update.records == []
    assert "\n" not in str(caught.value)
    assert not (output / "checkpoints").exists()


def test_settings_of_the_loop_that_do_not_go_with_the_step_are_refused(
    world: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    said = r"takes 7 steps, more than train\.steps=6, .* set train\.steps to 7"
    refused(world, tmp_path / "run", ConfigError, said, {}, steps=7)
    weighted = SampleWeightingConfig(type="uniform")
    refused(world, tmp_path / "run", ConfigError, "without sample weights", {}, sample_weighting=weighted)
    settings = SimpleNamespace(steps=6, save_checkpoint=False, sample_weighting=None)
    processes = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=3, mixed_precision="no")
    monkeypatch.setattr("craft_ray.lerobot.hook_settings.AcceleratorState", lambda: processes)
    said = r"anchor_batch_size 4 does not divide over 3 process.*: choose a multiple of 3"
    with pytest.raises(ConfigError, match=said):
        check_settings(experiment(world), settings)
    processes.distributed_type = DistributedType.FSDP
    with pytest.raises(ConfigError, match="needs all weights in each process, accelerate runs FSDP"):
        check_settings(experiment(world), settings)
    processes.distributed_type, processes.mixed_precision = DistributedType.NO, "fp16"
    with pytest.raises(ConfigError, match="does not scale the loss, which float16 needs"):
        check_settings(experiment(world), settings)


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
        (
            {"craft.keep": 0.9, "validation.old": {"data": {"path": str(world / "old")}}, "validation.every": 1},
            "craft.keep 0.9 follows validations",
        ),
    ):
        own = dict(vars(loop))
        with pytest.raises(ConfigError, match=said) as caught, craft_updates(experiment(world, changes)):
            raise AssertionError("it was not refused")
        assert "\n" not in str(caught.value)
        assert vars(loop) == own
