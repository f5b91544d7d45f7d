"""The costs of a pi0_fast policy: memory and step time of small ones, measured, and a sizing table for the real one.

    python -m benchmarks.robot_memory             # small policies: resident memory of a worker, time of a step
    python -m benchmarks.robot_memory --sizing    # the policy of 3.4 billion parameters: bytes, computed

The table is counted on PyTorch's meta device: every tensor that the real forward pass keeps for its backward pass
appears there with its size, but is not allocated.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Report, Row, Variant, arguments, interleaved
from benchmarks.memory import peak_in_process

GIB = 1 << 30
BATCH = 16
CAMERAS = 3


# -- small policies, measured


def policies() -> dict[str, Any]:
    from craft_ray.examples.robot import SIZE
    from craft_ray.lerobot.size import PaliGemmaSize

    small = PaliGemmaSize(
        width=256, depth=6, mlp=1024, heads=4, kv_heads=1, head_dim=64,
        vision_width=192, vision_depth=4, vision_mlp=768, vision_heads=4, patch=16, image=64, vocabulary=1792,
    )  # fmt: skip
    return {"tiny": SIZE, "small": small}


def write_policy(folder: Path, name: str) -> None:
    from lerobot.configs import FeatureType, PolicyFeature

    from craft_ray.examples import robot

    size = policies()[name]
    features = {
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, size.image, size.image)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
        "action": PolicyFeature(FeatureType.ACTION, (4,)),
    }
    ranges = {key: {"min": [-1.0] * 4, "max": [1.0] * 4} for key in ("observation.state", "action")}
    robot.write_policy(folder, size, features, _chunks(64), ["open the drawer"], ranges)


def _chunks(count: int) -> np.ndarray:
    steps = np.random.default_rng(0).normal(size=(count, 8, 4)) * 0.2
    return np.tanh(np.cumsum(steps, axis=1)).astype(np.float32)


class Steps:
    """One step of each arm on the same policy and samples."""

    def __init__(self, folder: str, arms: tuple[str, ...]) -> None:
        from craft_ray.config import CraftConfig, ModelConfig
        from craft_ray.data.frame import Frame
        from craft_ray.data.sample import Sample
        from craft_ray.method.dual import DualState
        from craft_ray.method.gradients import GradientPair
        from craft_ray.models import load_model

        torch.set_num_threads(1)
        self.model: Any = load_model(ModelConfig(kind="lerobot", path=folder), "fp32")
        side = self.model.settings.image_resolution[0]
        rng = np.random.default_rng(0)
        samples = [
            Sample(
                str(i),
                "open the drawer",
                frame=Frame(
                    {"observation.image": rng.integers(0, 255, (side, side, 3), dtype=np.uint8)},
                    {"observation.state": rng.normal(size=4).astype(np.float32) * 0.3},
                    chunk,
                ),
            )
            for i, chunk in enumerate(_chunks(BATCH))
        ]
        spoken = [self.model.preprocess(s, self.model.response_tokens(s)) for s in samples]
        silent = [self.model.preprocess(s) for s in samples]
        self.task = self.model.collate(spoken)
        self.anchors = {
            "token_ce": self.task,
            "hidden, prefix": self.model.collate(silent, ("vision_mean", "text_last")),
            "hidden, suffix": self.model.collate(spoken, ("suffix",)),
        }
        self.layers = (self.model.num_hidden_states - 2, self.model.num_hidden_states - 1)
        self.craft = CraftConfig(anchor_cache_dir="unused")
        self.dual = DualState.start(self.craft, torch.device("cpu"))
        constrained = any(arm != "baseline" for arm in arms)
        self.gradients = GradientPair(self.model.module.named_parameters(), with_retention=constrained)
        self.optimizer = torch.optim.AdamW(self.gradients.parameters, lr=1e-4, fused=True)
        self.teacher = {
            arm: batch.pooling(self.model.hidden_states(batch, self.layers)).values_BLVD.detach()
            for arm, batch in self.anchors.items()
            if batch.pooling is not None
        }

    def step(self, arm: str) -> None:
        from craft_ray.method.distance import hidden_loss
        from craft_ray.method.pooling import Vectors
        from craft_ray.method.step import craft_step, task_step
        from craft_ray.workers import OneWorker

        common: dict[str, Any] = {
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "workers": OneWorker(),
            "max_norm": 1.0,
        }
        if arm == "baseline":
            task_step(self.model.task_loss, [self.task], **common)
            return

        def retention(batch: Any) -> torch.Tensor:
            if arm == "token_ce":
                return self.model.token_loss(batch)
            student = batch.pooling(self.model.hidden_states(batch, self.layers))
            return hidden_loss(student, Vectors(self.teacher[arm], student.valid_BV), "relative_mse")

        self.dual, _ = craft_step(
            self.model.task_loss,
            [self.task],
            retention,
            [self.anchors[arm]],
            self.dual,
            0.05,
            craft=self.craft,
            **common,
        )


ARMS = ("baseline", "token_ce", "hidden, prefix", "hidden, suffix")


def take_steps(folder: str, arm: str, count: int) -> None:
    """What a worker of this arm does; for its peak memory."""
    steps = Steps(folder, (arm,))
    for _ in range(count):
        steps.step(arm)


def load_only(folder: str) -> None:
    from craft_ray.config import ModelConfig
    from craft_ray.models import load_model

    load_model(ModelConfig(kind="lerobot", path=folder), "fp32")


def measure(report: Report, rounds: int, names: tuple[str, ...]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(Path(scratch) / name)
            write_policy(Path(folder), name)
            steps = Steps(folder, ARMS)
            count = sum(p.numel() for p in steps.gradients.parameters) / 1e6
            timings = interleaved({arm: Variant(partial(steps.step, arm)) for arm in ARMS}, rounds)
            for arm in ARMS:
                what = f"{name} ({count:.2f} M), batch {BATCH}: {arm}"
                report.add(Row(what, timings.median(arm), "s"))
                if arm != "baseline":
                    report.add(Row.of(f"{what} over baseline", timings.ratio(arm, "baseline")))
            report.add(Row(f"{name}: worker, policy loaded", peak_in_process(load_only, folder) / GIB, "GiB"))
            for arm in ARMS:
                report.add(Row(f"{name}: worker, {arm}", peak_in_process(take_steps, folder, arm, 2) / GIB, "GiB"))


# -- the real policy, counted


@dataclass(frozen=True)
class Counted:
    """Parameters, and bytes that a forward pass keeps for its backward pass."""

    parameters: dict[str, int]
    activations: dict[tuple[bool, int], int]
    """By whether activations are recomputed, and samples in the batch."""


def count_real(batches: tuple[int, ...] = (1, 2)) -> Counted:
    """pi0_fast as LeRobot configures it: three cameras of 224 pixels, 200 text and 256 action tokens, float32."""
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
    from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPytorch

    parameters: dict[str, int] = {}
    activations = {}
    for recompute in (False, True):
        config = PI0FastConfig(device="cpu", dtype="float32")
        with torch.device("meta"):
            core = PI0FastPytorch(config).train()
        if recompute:
            core.gradient_checkpointing_enable()
        parameters = {}
        for key, parameter in core.named_parameters():
            part = _part(key)
            parameters[part] = parameters.get(part, 0) + parameter.numel()
        for batch in batches:
            activations[recompute, batch] = _kept(core, config, batch)
    return Counted(parameters, activations)


def _part(name: str) -> str:
    if "vision_tower" in name or "projector" in name:
        return "vision"
    if "lm_head" in name or "embed_tokens" in name:
        return "vocabulary"
    return "language blocks"


def _kept(core: Any, config: Any, batch: int) -> int:
    """Bytes of the tensors that autograd keeps, without parameters, each storage once."""
    weights = {p.untyped_storage()._cdata for p in core.parameters()}
    storages: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage  # kept alive, or its address would be reused
        return tensor

    side = config.image_resolution[0]
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        core.forward(
            [torch.empty(batch, 3, side, side) for _ in range(CAMERAS)],
            [torch.ones(batch, dtype=torch.bool) for _ in range(CAMERAS)],
            torch.zeros(batch, config.tokenizer_max_length, dtype=torch.long),
            torch.ones(batch, config.tokenizer_max_length, dtype=torch.bool),
            torch.zeros(batch, config.max_action_tokens, dtype=torch.long),
            torch.ones(batch, config.max_action_tokens, dtype=torch.bool),
        )
    return sum(storage.nbytes() for storage in storages.values())


def sizing(report: Report) -> None:
    started = time.perf_counter()
    found = count_real()
    total = sum(found.parameters.values())
    for part, count in found.parameters.items():
        report.add(Row(f"parameters, {part}", count / 1e9, "1e9"))
    report.add(Row("parameters", total / 1e9, "1e9"))
    copies = {
        "weights": 4,
        "task gradient": 4,
        "retention gradient (CRaFT's one extra copy)": 4,
        "AdamW's two moments": 8,
    }
    for what, size in copies.items():
        report.add(Row(f"{what}, float32", size * total / GIB, "GiB"))
    report.add(Row("weights, bfloat16", 2 * total / GIB, "GiB"))
    for (recompute, batch), kept in found.activations.items():
        how = "recomputed" if recompute else "kept"
        report.add(Row(f"activations {how}, {batch} sample(s), float32", kept / GIB, "GiB"))
    print(f"counted in {time.perf_counter() - started:.0f} s", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--sizing", action="store_true", help="the table of the real policy, computed")
    options = parser.parse_args(argv)
    report = Report("robot_memory", "processor time of the process", judge=False)
    if options.sizing:
        sizing(report)
    else:
        measure(report, 3 if options.tiny else options.rounds, ("tiny",) if options.tiny else ("tiny", "small"))
    report.finish(options.json)


if __name__ == "__main__":
    main()
