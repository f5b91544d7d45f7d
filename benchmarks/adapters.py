"""An adapter against full training, and one gradient row against two: times of a step, and bytes of its state.

Targets: a step that trains an adapter of rank 8 takes at most 0.75 of a full one on the same batch; its gradients and
moments at SmolLM2-135M's size are at most 2 % of those of full training; one row is one copy of the gradients less.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from benchmarks.harness import CPU_TIME, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.variants import SETTINGS, Ours, ours
from benchmarks.workload import SHAPES, RetentionTask, language_model
from craft_ray.config import AdapterConfig, ModelConfig
from craft_ray.models.adapters import attach
from craft_ray.models.base import Model

RANK = 8
ONE_ROW: Any = SimpleNamespace(**{**vars(SETTINGS), "use_grad_projection": False, "log_angle": False})
TWO_ROWS: Any = SimpleNamespace(**{**vars(SETTINGS), "use_grad_projection": False})


def made(size: str, batch: int, length: int, adapter: AdapterConfig | None = None, settings: Any = SETTINGS) -> Ours:
    """The product's step on a model of its own."""
    task = RetentionTask.of(language_model(SHAPES[size]).train(), batch, length)
    if adapter is not None:
        attach(cast(Model, SimpleNamespace(module=task.model, adapter=None)), adapter, ModelConfig(path=size), "-")
    return ours(task, settings=settings)


def state_bytes(step: Ours) -> int:
    """Gradients and moments."""
    moments = [t for state in step.optimizer.state.values() for t in state.values() if t.dim()]
    return sum(tensor.nbytes for tensor in (*step.gradients.buffers, *moments))


def measure(report: Report, size: str, batch: int, length: int, rounds: int) -> None:
    where = f"{size} {batch}x{length}"
    steps = {
        "full": made(size, batch, length),
        "lora": made(size, batch, length, AdapterConfig(r=RANK)),
        "attention": made(size, batch, length, AdapterConfig(r=RANK, target_modules=("q_proj", "v_proj"))),
    }
    variants = {f"{name} task": Variant(step.task_step) for name, step in steps.items()}
    variants |= {name: Variant(step.step) for name, step in steps.items()}
    times = interleaved(variants, rounds)
    for name, what in (("lora", f"LoRA r={RANK}"), ("attention", f"LoRA r={RANK} of q_proj and v_proj")):
        target = "<= 0.75" if name == "lora" else None
        note = f"full {times.median('full') * 1e3:.0f} ms"
        report.add(Row.of(f"{where}: {what}, craft_step / full", times.ratio(name, "full"), target, note))
        note = f"full {times.median('full task') * 1e3:.0f} ms"
        report.add(Row.of(f"{where}: {what}, task step / full", times.ratio(f"{name} task", "full task"), target, note))
        share = 100 * state_bytes(steps[name]) / state_bytes(steps["full"])
        report.add(Row(f"{where}: {what}, gradients and moments / full", share, "percent", target="<= 2"))


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
    for size, batch, length in cases:
        measure(report, size, batch, length, 3 if options.tiny else options.rounds)
    size, batch, length = cases[-1]
    measure_rows(report, size, batch, length, 3 if options.tiny else options.rounds)
    report.finish(options.json)


if __name__ == "__main__":
    main()
