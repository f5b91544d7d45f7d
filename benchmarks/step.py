"""The retention step against the two passes and the optimiser step that it consists of; surgery alone; memory; waits.

Targets: craft_step at most 1.05 of its parts at 100 M parameters and 1.12 at 10 M with one text of 32 tokens;
surgery at most 1.35 of one read of both gradients and one axpy; at most 1.2 copies of the gradients; no wait for
the device.
"""

from __future__ import annotations

from benchmarks.harness import CPU_TIME, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.memory import peak_in_process
from benchmarks.syncs import host_syncs
from benchmarks.variants import (
    PARTS,
    Ours,
    Plainly,
    has_torchjd,
    naive_surgery,
    operate,
    ours,
    read_and_axpy,
    step_variants,
)
from benchmarks.workload import SHAPES, RetentionTask, language_model, perceptron_task

CASES = (("10m", 1, 32, "<= 1.12"), ("10m", 4, 256, None), ("100m", 1, 32, "<= 1.05"), ("100m", 2, 128, "<= 1.05"))
TINY = (("tiny", 1, 16, None),)


def task_of(size: str, batch: int, length: int) -> RetentionTask:
    return RetentionTask.of(language_model(SHAPES[size]).train(), batch, length)


def measure_step(report: Report, size: str, batch: int, length: int, target: str | None, rounds: int) -> None:
    variants = step_variants(task_of(size, batch, length), task_of(size, batch, length))
    times = interleaved(variants, rounds)
    where = f"{size} {batch}x{length}"
    unit_ms = sum(times.median(part) for part in PARTS) * 1e3
    for name in variants:
        if name not in PARTS:
            aim = target if name == "craft_step" else None
            report.add(Row.of(f"{where}: {name} / its parts", times.ratio(name, PARTS), aim, f"parts {unit_ms:.0f} ms"))
    report.add(Row.of(f"{where}: craft_step / plain task step", times.ratio("craft_step", "plain task step")))


def measure_surgery(report: Report, size: str, rounds: int) -> None:
    product = ours(task_of(size, 1, 16))
    product.fill()
    gradients = product.gradients
    variants = {
        "unit": Variant(lambda: read_and_axpy(gradients)),
        "surgery": Variant(lambda: operate(gradients, product.state)),
        "comparison": Variant(gradients.gram),
        "lists": Variant(lambda: naive_surgery(*gradients.views)),
    }
    times = interleaved(variants, rounds)
    note = f"unit {times.median('unit') * 1e3:.1f} ms"
    report.add(Row.of(f"{size}: surgery / dot and axpy", times.ratio("surgery", "unit"), "<= 1.35", note))
    report.add(Row.of(f"{size}: comparison within surgery / dot and axpy", times.ratio("comparison", "unit")))
    report.add(Row.of(f"{size}: surgery with lists / dot and axpy", times.ratio("lists", "unit")))


def three_steps(size: str, batch: int, length: int, variant: str) -> None:
    """Runs in a separate process, whose peak memory is measured."""
    one_thread()
    task = task_of(size, batch, length)
    if variant == "craft_step":
        step = ours(task).step
    else:
        plain = Plainly(task)
        step = {"plain": plain.task_step, "lists": plain.naive, "torchjd": plain.torchjd}[variant]
    for _ in range(3):
        step()


def measure_memory(report: Report, size: str, batch: int, length: int) -> None:
    copy = sum(p.numel() * p.element_size() for p in language_model(SHAPES[size], device="meta").parameters())
    plain = peak_in_process(three_steps, size, batch, length, "plain")
    variants: dict[str, str | None] = {"craft_step": "<= 1.2"}
    if report.judge:
        variants |= {"lists": None} | ({"torchjd": None} if has_torchjd() else {})
    for variant, target in variants.items():
        extra = (peak_in_process(three_steps, size, batch, length, variant) - plain) / copy
        what = f"{size} {batch}x{length}: memory of {variant} beyond a plain step"
        report.add(Row(what, extra, "copies", target=target, note=f"a copy of the gradients: {copy / 2**20:.0f} MiB"))


def measure_syncs(report: Report) -> None:
    model, loss, task, anchors = perceptron_task("cpu")
    product = Ours(model.named_parameters(), loss, loss, task, anchors)
    waits = host_syncs(product.step)
    report.add(Row("waits of craft_step", sum(waits.values()), "waits", target="<= 0", note=_listed(waits)))
    text = task_of("tiny", 1, 16)
    plain = Plainly(text)
    steps = {"upstream model, task pass": plain.task_pass, "upstream model, retention pass": plain.retention_pass}
    steps["lists and .item()"] = plain.naive
    if has_torchjd():
        steps["TorchJD PCGrad"] = plain.torchjd
    for name, step in steps.items():
        waits = host_syncs(step)
        report.add(Row(f"waits of {name}", sum(waits.values()), "waits", note=_listed(waits)))


def _listed(waits: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in waits.items())


def main() -> None:
    parser = arguments(__doc__, rounds=11)
    parser.add_argument("--size", help="only the cases of this size")
    options = parser.parse_args()
    one_thread()
    report = Report("step", CPU_TIME.name, judge=not options.tiny)
    cases = TINY if options.tiny else [c for c in CASES if options.size in (None, c[0])]
    rounds = 3 if options.tiny else options.rounds
    for size, batch, length, target in cases:
        measure_step(report, size, batch, length, target, rounds)
    for size in dict.fromkeys(case[0] for case in cases):
        measure_surgery(report, size, 2 * rounds)
    size, batch, length, _ = cases[-2] if len(cases) > 1 else cases[0]
    measure_memory(report, size, batch, length)
    measure_syncs(report)
    report.finish(options.json)


if __name__ == "__main__":
    main()
