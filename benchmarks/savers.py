"""What saves memory in a step, against a step without it: its time, and the bytes of gradients and moments.

One gradient row, a second one in bfloat16, and moments in 8 bits (`train.optimizer: adamw_8bit`, where torchao is
installed); attention and compiled layers with `--compile`, which takes minutes. All against two rows and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import CPU_TIME, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.workload import SHAPES, RetentionTask, language_model
from craft_ray.config import CraftConfig, TrainConfig
from craft_ray.extras import missing
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import GradientPair
from craft_ray.method.step import compares_gradients, craft_step
from craft_ray.models.compiling import compile_blocks
from craft_ray.run.optimization import make_optimization
from craft_ray.workers import OneWorker

PLAIN = CraftConfig(epsilon_start=0.1, use_grad_projection=False, lambda_floor=0.0)


class Step:
    """The product's step on a model of its own."""

    def __init__(
        self,
        size: str,
        batch: int,
        length: int,
        craft: CraftConfig = PLAIN,
        optimizer: str = "adamw",
        change: Callable[[Any], None] | None = None,
    ) -> None:
        module = language_model(SHAPES[size]).train()
        if change is not None:
            change(module)
        self.task, self.craft = RetentionTask.of(module, batch, length), craft
        self.gradients = GradientPair(
            module.named_parameters(),
            with_retention=compares_gradients(craft),
            short_retention=craft.retention_grad_dtype == "bfloat16",
        )
        config = TrainConfig(steps=1000, optimizer=optimizer, learning_rate=1e-5)  # type: ignore[arg-type]
        self.optimizer = make_optimization(None, self.gradients.parameters, config).optimizer  # type: ignore[arg-type]
        self.state = DualState.start(craft)

    def step(self) -> None:
        task = self.task
        self.state, _ = craft_step(
            task.task_loss, [task.task], task.retention_loss, [task.anchors], self.state, 0.1,
            craft=self.craft, optimizer=self.optimizer, gradients=self.gradients, workers=OneWorker(), max_norm=1.0,
        )  # fmt: skip

    def gradient_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.gradients.buffers, *self.gradients.short))

    def moment_bytes(self) -> int:
        held = [t for state in self.optimizer.state.values() for t in state.values() if t.ndim]
        return sum(_bytes(t) for t in held)


def _bytes(tensor: Tensor) -> int:
    """Bytes of a moment; torchao's are codes, with a scale for each block."""
    parts = (tensor.codes, tensor.scale, tensor.qmap) if hasattr(tensor, "codes") else (tensor,)
    return sum(part.nbytes for part in parts)


def _eager(module: Any) -> None:
    module.set_attn_implementation("eager")


def _compiled(module: Any) -> None:
    compile_blocks(module, torch.device("cpu"))


def variants(size: str, batch: int, length: int, compiling: bool) -> dict[str, Step]:
    found = {
        "two rows": Step(size, batch, length),
        "one row": Step(size, batch, length, PLAIN.model_copy(update={"log_angle": False})),
        "second row in bfloat16": Step(
            size, batch, length, PLAIN.model_copy(update={"retention_grad_dtype": "bfloat16"})
        ),
        "eager attention": Step(size, batch, length, change=_eager),
    }
    if not missing("torchao"):
        found["moments in 8 bits"] = Step(size, batch, length, optimizer="adamw_8bit")
    if compiling:
        found["compiled layers"] = Step(size, batch, length, change=_compiled)
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--size", default="10m", choices=SHAPES)
    parser.add_argument("--compile", action="store_true", help="with compiled layers, too")
    options = parser.parse_args()
    one_thread()
    size, batch, length = ("tiny", 1, 16) if options.tiny else (options.size, 2, 128)
    report = Report("savers", CPU_TIME.name, judge=not options.tiny)
    steps = variants(size, batch, length, options.compile)
    times = interleaved(
        {name: Variant(step.step) for name, step in steps.items()}, 3 if options.tiny else options.rounds
    )
    base = steps.pop("two rows")
    for name, step in steps.items():
        where = f"{size} {batch}x{length}: {name}"
        report.add(Row.of(f"{where}, step / two rows and AdamW", times.ratio(name, "two rows")))
        for what in ("gradient", "moment"):
            ratio = getattr(step, f"{what}_bytes")() / getattr(base, f"{what}_bytes")()
            report.add(Row(f"{where}, bytes of {what}s / the same", ratio))
    report.finish(options.json)


if __name__ == "__main__":
    main()
