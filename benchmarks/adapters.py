"""An adapter against full training, and one gradient row against two: times of a step, and bytes of its state.

Targets: a step that trains an adapter of rank 8 takes at most 0.75 of a full one on the same batch; its gradients and
moments at SmolLM2-135M's size are at most 2 % of those of full training; one row is one copy of the gradients less.
Needs neither Ray nor pydantic.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.harness import CPU_TIME, Clock, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.variants import SETTINGS, Ours, ours
from benchmarks.workload import SHAPES, RetentionTask, language_model
from craft_ray.models.adapting import attach

LORA: Any = SimpleNamespace(
    r=8,
    alpha=8,
    dropout=0.0,
    target_modules="all-linear",
    modules_to_save=(),
    use_rslora=False,
    use_dora=False,
    init=True,
)
"""The settings of `AdapterConfig`, for machines without pydantic."""
ATTENTION: Any = SimpleNamespace(**{**vars(LORA), "target_modules": ("q_proj", "v_proj")})
TWO_ROWS: Any = SimpleNamespace(**{**vars(SETTINGS), "use_grad_projection": False, "lambda_floor": 0.0})
ONE_ROW: Any = SimpleNamespace(**{**vars(TWO_ROWS), "log_angle": False})
CPU = torch.device("cpu")


def made(
    size: str,
    batch: int,
    length: int,
    *,
    adapter: Any = None,
    settings: Any = SETTINGS,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Ours:
    """The product's step on a model of its own."""
    task = RetentionTask.of(language_model(SHAPES[size], dtype=dtype, device=device).train(), batch, length)
    if adapter is not None:
        model: Any = SimpleNamespace(module=task.model, adapter=None, merged_adapter=None)
        attach(model, adapter, SimpleNamespace(path=size, revision=None), "-")  # type: ignore[arg-type]
    return ours(task, settings=settings)


def state_bytes(step: Ours) -> int:
    """Gradients and moments."""
    moments = [t for state in step.optimizer.state.values() for t in state.values() if t.dim()]
    return sum(tensor.nbytes for tensor in (*step.gradients.buffers, *moments))


def measure_adapters(
    report: Report,
    size: str,
    batch: int,
    length: int,
    rounds: int,
    clock: Clock = CPU_TIME,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    budget_s: float = 200.0,
) -> None:
    """Times and state of adapters over those of full training."""
    where = f"{size} {batch}x{length}"
    kinds = {"full": None, "LoRA r=8": LORA, "LoRA r=8 of q_proj and v_proj": ATTENTION}
    steps = {
        name: made(size, batch, length, adapter=adapter, device=device, dtype=dtype) for name, adapter in kinds.items()
    }
    variants = {f"{name}, task step": Variant(step.task_step) for name, step in steps.items()}
    variants |= {f"{name}, craft_step": Variant(step.step) for name, step in steps.items()}
    times = interleaved(variants, rounds, clock, budget_s)
    for name in list(kinds)[1:]:
        target = "<= 0.75" if name == "LoRA r=8" else None
        for kind in ("craft_step", "task step"):
            ratio, note = times.ratio(f"{name}, {kind}", f"full, {kind}"), times.median(f"full, {kind}")
            report.add(Row.of(f"{where}: {name}, {kind} / full", ratio, target, f"full {note * 1e3:.0f} ms"))
        share = 100 * state_bytes(steps[name]) / state_bytes(steps["full"])
        target = "<= 2" if size == "smollm2" else None
        report.add(Row(f"{where}: {name}, gradients and moments / full", share, "percent", target=target))


def measure_rows(report: Report, size: str, batch: int, length: int, rounds: int) -> None:
    where = f"{size} {batch}x{length}"
    steps = {
        "one": made(size, batch, length, settings=ONE_ROW),
        "two": made(size, batch, length, settings=TWO_ROWS),
    }
    times = interleaved({name: Variant(step.step) for name, step in steps.items()}, rounds)
    report.add(Row.of(f"{where}: one gradient row, craft_step / two rows", times.ratio("one", "two")))
    copy = sum(p.numel() * p.element_size() for p in steps["two"].gradients.parameters)
    less = (state_bytes(steps["two"]) - state_bytes(steps["one"])) / copy
    report.add(Row(f"{where}: one gradient row, state saved", less, "copies", target=">= 1"))


def main() -> None:
    options = arguments(__doc__, rounds=7).parse_args()
    one_thread()
    report = Report("adapters", CPU_TIME.name, judge=not options.tiny)
    cases = (("tiny", 1, 16),) if options.tiny else (("smollm2", 1, 128), ("100m", 2, 128))
    rounds = 3 if options.tiny else options.rounds
    for size, batch, length in cases:
        measure_adapters(report, size, batch, length, rounds)
    size, batch, length = cases[-1]
    measure_rows(report, size, batch, length, rounds)
    report.finish(options.json)


if __name__ == "__main__":
    main()
