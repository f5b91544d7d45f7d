"""Policies whose weights two workers share: each type computes what it computes alone, and so do whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("lerobot")

from craft_pipelines.anchors import build
from craft_pipelines.merge import merge
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from safetensors.torch import load_file

from craft_ray.config import Experiment, ModelConfig, RolloutConfig, parse_config
from craft_ray.config.training import WorkersConfig
from craft_ray.data.frame import Frame
from craft_ray.data.sample import Sample
from craft_ray.lerobot import folder as folders_of_policies
from craft_ray.lerobot.pi0_fast import PI0Fast
from craft_ray.lerobot.policy import LeRobotPolicy
from craft_ray.lerobot.rollout import Rollouts
from craft_ray.lerobot.size import sized
from craft_ray.models import load_model
from craft_ray.models.sharding import open_mesh, whole
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker, Workers
from tests.support.processes import on_workers
from tests.support.robots import TASKS, small_policy, write_dataset
from tests.support.robots_others import small_act, small_pi05, small_pi05_sizes, small_smolvla
from tests.support.runs import trained_together

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # two processes

MAKERS: dict[str, Callable[[Path], Path]] = {
    "pi0_fast": small_policy,
    "pi05": small_pi05,
    "smolvla": small_smolvla,
    "act": small_act,
    "smolvla's expert": partial(small_smolvla, train_expert_only=True, freeze_vision_encoder=True),
}
CASES = [(kind, False) for kind in MAKERS] + [("pi0_fast", True), ("pi05", True)]
"""Types of policies, without and with gradient checkpointing."""

Numbers = dict[str, Any]


def sample(number: int, side: int) -> Sample:
    random = np.random.default_rng(number)
    picture = {"observation.images.camera0": random.integers(0, 256, (side, side, 3), np.uint8)}
    state = {"observation.state": random.uniform(-1, 1, 4).astype(np.float32)}
    return Sample(f"a{number}", TASKS[number % 2], frame=Frame(picture, state, state["observation.state"][None]))


# -- what a policy computes


class Ending:
    """A simulator whose episodes are over after as many decisions as their seed says."""

    description, action_size, max_decisions = TASKS[0], 4, 9

    def __init__(self) -> None:
        self.actions: list[np.ndarray] = []

    def reset(self, seed: int) -> None:
        self._frame = sample(seed, 32).frame
        self._left = seed

    def observe(self) -> Frame:
        assert self._frame is not None
        return self._frame

    def step(self, action: np.ndarray) -> bool:
        self.actions.append(action)
        self._left -= 1
        return False

    @property
    def over(self) -> bool:
        return self._left <= 0

    def close(self) -> None: ...


class Endings(Rollouts):
    def __init__(self) -> None:
        self.config = RolloutConfig(env="metaworld", task="none", episodes=6, seed=1, execute=1)
        self.name = "endings"
        self._simulations: list[Any] = []
        self._names: dict[str, str] = {}

    def _make(self) -> Any:
        return Ending()


def computed(model: LeRobotPolicy, workers: Workers) -> Numbers:
    """Losses, hidden states and actions of a policy, and the gradients of what is trained."""
    pi0_fast = isinstance(model, PI0Fast)
    samples = [sample(number, 32 if pi0_fast else 64) for number in range(3)]
    prepared = [model.preprocess_task(one) for one in samples] if not pi0_fast else []
    if isinstance(model, PI0Fast):
        prepared = [model.preprocess(one, [7 + i, 8, 20, 33][: 2 + i]) for i, one in enumerate(samples)]
    batch = model.collate(prepared)
    found: Numbers = {"weights": model.weights_fingerprint()}

    def differentiate(name: str, forward: Any) -> None:
        forward()  # the first pass looks for dropout
        if model.sharded:
            model.module.reshard()  # type: ignore[operator]
        model.module.zero_grad()
        torch.manual_seed(5)
        outputs = forward()
        found[name] = [output.detach() for output in outputs]
        if not outputs[0].requires_grad:  # the part of the prompt is frozen
            return
        sum(output.square().mean() for output in outputs).backward()
        gradients = {n: whole(p.grad) for n, p in model.module.named_parameters() if p.grad is not None}
        found[f"{name}, gradients"] = {n: g.clone() for n, g in gradients.items() if g.any()}

    differentiate("task", lambda: [model.task_loss(batch)])
    for layers in ([0], [1], [2], [1, 2]):
        differentiate(f"hidden {layers}", lambda layers=layers: model.hidden_states(batch, layers))
    own = samples if workers.rank else samples[1:2]
    if isinstance(model, PI0Fast):
        differentiate("log-probabilities", lambda: [model.token_log_probs(batch)[0]])
        prompts = [model.preprocess(one) for one in own]
        found["generated"] = model.generate(prompts, 9 if workers.rank else 5)
        model.settings.max_decoding_steps = 6 if workers.rank else 8  # as if one met its end earlier
    torch.manual_seed(1)
    found["actions"] = model.act(own)
    if pi0_fast:
        rollouts = Endings()
        found["episodes"] = rollouts.run(model, [1, 4] if workers.rank else [2], workers)
        found["decisions"] = [simulation.actions for simulation in rollouts._simulations]
    return found


def in_bfloat16(model: LeRobotPolicy) -> list[Tensor]:
    """A loss, hidden states and the size of their gradient."""
    pi0_fast = isinstance(model, PI0Fast)
    one = sample(0, 32 if pi0_fast else 64)
    batch = model.collate([model.preprocess(one, [7, 8]) if isinstance(model, PI0Fast) else model.preprocess_task(one)])
    torch.manual_seed(5)
    outputs = [model.task_loss(batch), *model.hidden_states(batch, [1, 2])]
    sum(output.float().square().mean() for output in outputs).backward()
    if model.sharded:
        model.module.reshard()  # type: ignore[operator]
    norms = [whole(p.grad).norm() for p in model.module.parameters() if p.grad is not None]
    return [*(output.detach().float() for output in outputs), torch.stack(norms).norm()]


def alone_and_shared(workers: Workers, folders: dict[str, Path]) -> list[tuple[Numbers, Numbers, float]]:
    """For each case what a worker computes with a policy of its own, what with the shared one, and how much of that it
    holds."""
    mesh = open_mesh(WorkersConfig(num_workers=2, sharding="full"), workers)
    load_weights = folders_of_policies.load_weights
    results = []
    with small_pi05_sizes():
        for kind, checkpointing in CASES:
            config = ModelConfig(kind="lerobot", path=str(folders[kind]), gradient_checkpointing=checkpointing)
            folders_of_policies.load_weights = load_weights
            alone = load_model(config, "fp32")
            if workers.rank:
                folders_of_policies.load_weights = None  # type: ignore[assignment] # the first worker alone reads them
            shared = load_model(config, "fp32", mesh=mesh)
            assert isinstance(alone, LeRobotPolicy)
            assert isinstance(shared, LeRobotPolicy)
            pair = computed(alone, OneWorkerAs(workers.rank)), computed(shared, workers)
            shared.module.reshard()  # type: ignore[operator]
            held = sum(p.to_local().numel() for p in shared.module.parameters())  # type: ignore[attr-defined]
            if not checkpointing:
                for found, own in zip(pair, (None, mesh), strict=True):
                    folders_of_policies.load_weights = load_weights
                    short = load_model(config, "bf16", mesh=own)
                    assert isinstance(short, LeRobotPolicy)
                    found["in bfloat16"] = in_bfloat16(short)
            results.append((*pair, held / sum(p.numel() for p in alone.module.parameters())))
    return results


class OneWorkerAs(OneWorker):
    """A worker of its own that does what the worker of this rank does."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank=rank)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[Numbers, Numbers, float]]]:
    """Of each worker what `alone_and_shared` returns."""
    root = tmp_path_factory.mktemp("policies")
    folders = {kind: make(root / kind) for kind, make in MAKERS.items()}
    return on_workers(2, alone_and_shared, root / "processes", folders)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{kind}{', checkpointed' * on}" for kind, on in CASES])
def test_a_shared_policy_computes_what_it_computes_alone(case: int, results: Any) -> None:
    for worker in results:
        alone, shared, held = worker[case]
        assert held == pytest.approx(0.5, abs=0.01)
        assert len(alone["task, gradients"]) > 10
        assert shared.keys() == alone.keys()
        for name, expected in alone.items():
            same(shared[name], expected, name)


def same(found: Any, expected: Any, name: str) -> None:
    """Whether two results are equal, their numbers within rounding."""
    if isinstance(expected, Tensor | np.ndarray):
        tolerance = {"rtol": 0.1, "atol": 0.1} if name == "in bfloat16" else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(
            torch.as_tensor(found), torch.as_tensor(expected), **tolerance, msg=lambda m: f"{name}: {m}"
        )
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            same(found[key], value, f"{name}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), name
        for one, other in zip(found, expected, strict=True):
            same(one, other, name)
    else:
        assert found == expected, name


# -- runs of pi0_fast

STEPS = 4
SHARDED = {"workers.num_workers": 2, "workers.sharding": "full"}
VARIANTS: dict[str, dict[str, Any]] = {
    "hidden": {},
    "token_ce": {
        "craft.retention_mode": "token_ce", "craft.epsilon_start": 1.0, "train.accumulate": 2,
        "model.gradient_checkpointing": True,
    },
    "policy's optimiser": {
        "train": {"steps": STEPS, "batch_size": 4, "optimizer": "policy", "check_minutes": 0},
        "craft.enabled": False, "craft.anchor_cache_dir": None,
    },
    "lora": {"adapter": {"r": 4, "alpha": 8}, "train.learning_rate": 1e-2},
}  # fmt: skip


def experiment(root: Path, changes: dict[str, Any] | None = None) -> Experiment:
    """A few steps, with 7 held-out rows, which two workers cannot share evenly."""
    names = {"observation.images.top": "observation.images.camera0"}
    source = {"path": str(root / "data"), "rename": names}
    scored = {"data": {**source, "limit": 7}, "metric": "perplexity", "batch_size": 2, "replies": 3}
    tree = {
        "output_dir": str(root / "runs"),
        "model": {"kind": "lerobot", "path": str(root / "policy")},
        "task": source,
        "anchors": {
            "source": source, "positions": ["suffix"], "modes": ["hidden", "token_ce"], "max_new_tokens": 6,
        },
        "craft": {
            "anchor_cache_dir": str(root / "anchors"), "anchor_batch_size": 4, "anchor_holdout": 0.25,
            "epsilon_start": 1e-3, "conflict_threshold": 0.9, "projection_gate": "always",
        },
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 2e-3, "check_minutes": 0, "checkpoint_every": 2},
        "validation": {"new": scored, "every": 2},
        "evaluation": {"new": scored},
        "workers": {"num_workers": 0},
    }  # fmt: skip
    return parse_config(tree, "test").changed(changes or {})


def resumed(workers: Workers, path: Path, source: Path, config: Experiment) -> None:
    """A run from the checkpoint of step 2 of another one."""
    if workers.rank == 0:
        shutil.copytree(source, path, symlinks=True)
        (path / "result.json").unlink()
        (path / "checkpoints" / "last").unlink()
        (path / "checkpoints" / "last").symlink_to("step_000002")
    workers.gather(None)
    train(config, RunFolder(path), workers, NullObserver())


def as_two(workers: Workers, root: Path) -> None:
    for name, changes in VARIANTS.items():
        trained_together(workers, experiment(root, {**changes, **SHARDED}), root / "two" / name)
    resumed(workers, root / "again", root / "two" / "hidden", experiment(root, SHARDED))
    resumed(workers, root / "two of one", root / "one" / "hidden", experiment(root, SHARDED))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, and each variant trained by one worker and by two that share the policy."""
    root = tmp_path_factory.mktemp("runs")
    small_policy(root / "policy")
    write_dataset(root / "data", episodes=5)
    build(experiment(root), say=lambda _: None)
    for name, changes in VARIANTS.items():
        trained_together(OneWorker(), experiment(root, changes), root / "one" / name)
    on_workers(2, as_two, root / "processes", root)
    return root


def weights(path: Path) -> dict[str, Tensor]:
    (file,) = (path / "checkpoints" / "last" / "model").glob("*model.safetensors")
    return load_file(file)


def near(found: Path, expected: Path) -> None:
    """Whether two runs have the same weights, within rounding. The bias of a key changes no attention: its gradient is
    rounding, which AdamW scales up."""
    pair = [{k: w for k, w in weights(path).items() if not k.endswith("k_proj.bias")} for path in (found, expected)]
    torch.testing.assert_close(*pair, rtol=1e-3, atol=2e-5)


def measured(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in RunFolder(path).read_metrics()]


@pytest.mark.parametrize("name", VARIANTS)
def test_two_workers_that_share_a_policy_are_one(name: str, world: Path) -> None:
    one, two = world / "one" / name, world / "two" / name
    alike(measured(two), measured(one))
    near(two, one)
    alike(list(RunFolder(two).read_validation()), list(RunFolder(one).read_validation()))
    expected, found = (json.loads((path / "result.json").read_text()) for path in (one, two))
    alike(found["new"], expected["new"])


def alike(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            alike(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            alike(one, other)
    else:
        assert found == (pytest.approx(expected, rel=2e-3, abs=1e-5) if isinstance(expected, float) else expected)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(world: Path) -> None:
    assert measured(world / "again") == measured(world / "two" / "hidden")
    for name, tensor in weights(world / "two" / "hidden").items():
        assert torch.equal(weights(world / "again")[name], tensor), name


def test_another_number_of_workers_resumes_it(world: Path) -> None:
    resumed(OneWorker(), world / "one of two", world / "two" / "hidden", experiment(world))
    for path in (world / "one of two", world / "two of one"):
        near(path, world / "one" / "hidden")


def test_lerobot_loads_what_was_trained(world: Path, tmp_path: Path) -> None:
    """The folder of the last checkpoint, and the one that is merged from the parts of an earlier one."""
    model = world / "two" / "hidden" / "checkpoints" / "last" / "model"
    with sized(model):
        policy = PI0FastPolicy.from_pretrained(model)
    state = policy.state_dict()
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(state[name], tensor), name
    found = load_model(ModelConfig(kind="lerobot", path=str(model)), "fp32").weights_fingerprint()
    assert found != load_model(ModelConfig(kind="lerobot", path=str(world / "policy")), "fp32").weights_fingerprint()
    source = tmp_path / "run"
    shutil.copytree(world / "two" / "hidden", source, symlinks=True)
    shutil.rmtree(source / "checkpoints" / f"step_{STEPS:06d}" / "model")
    merge(source, tmp_path / "merged", lambda _: None)
    merged = load_model(ModelConfig(kind="lerobot", path=str(tmp_path / "merged")), "fp32")
    assert merged.weights_fingerprint() == found
