"""One GPU in under eight minutes: building the cache, the retention step, memory, adapters, waits for the device.

Needs torch and transformers; neither Ray nor pydantic. Adapters need PEFT, and are left out without it. Models have
random weights in bfloat16, up to the size of Gemma 2B. A size that does not fit in memory, or for which no time is
left, is reported as such.
`--tiny` runs the same on a CPU in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.adapters import measure_adapters
from benchmarks.harness import CPU_TIME, CUDA, Clock, Report, Row, Variant, arguments, interleaved, one_thread
from benchmarks.syncs import host_syncs
from benchmarks.variants import (
    PARTS,
    Ours,
    Plainly,
    has_torchjd,
    operate,
    ours,
    read_and_axpy,
)
from benchmarks.workload import (
    SHAPES,
    RetentionTask,
    Shape,
    language_model,
    mixed_lengths,
    perceptron_task,
    random_texts,
)
from craft_ray.extras import missing
from craft_ray.models.packing import packed_forward, plan_packs

LIMIT_S = 400.0
PASS_S = 2.0
"""About the longest time for one pass of a build; slower GPUs get fewer rows."""
SIZES = ("100m", "400m", "1b", "2.5b")
STEP_CASES = ((1, 32), (8, 128))
PACKS = (2048, 8192, 32768)


@dataclass
class Session:
    """The device and the time limit of the measurements."""

    report: Report
    device: torch.device
    dtype: torch.dtype
    clock: Clock
    rounds: int
    end: float

    def attempt(self, what: str, measure: Callable[[], None]) -> None:
        """Measure; what does not fit in memory or in time becomes a line of the report."""
        if time.monotonic() > self.end:
            self.report.add(Row(what, None, note="skipped, out of time"))
            return
        if not self._fits(measure):
            self.report.add(Row(what, None, note="out of memory"))

    def fitting(self, where: str, variants: dict[str, Variant]) -> dict[str, Variant]:
        """The variants that fit in memory; the others become lines of the report."""

        def once(variant: Variant) -> None:
            if variant.prepare is not None:
                variant.prepare()
            variant.run()

        found = {name: v for name, v in variants.items() if self._fits(lambda v=v: once(v))}  # type: ignore[misc]
        for name in variants.keys() - found.keys():
            self.report.add(Row(f"{where}: {name}", None, note="out of memory"))
        return found

    def _fits(self, run: Callable[[], None]) -> bool:
        try:
            run()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if "out of memory" not in str(error) and "allocate memory" not in str(error):
                raise
            return False
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return True


def matmul_peak(session: Session, size: int) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=session.device, dtype=session.dtype) for _ in range(2))
    times = interleaved({"matmul": Variant(lambda: a @ b)}, 10, session.clock)
    return 2 * size**3 / min(times.seconds["matmul"])


def useful_flops(shape: Shape, lengths: Sequence[int]) -> float:
    """Floating-point operations of the base model over the real tokens, causal attention counted once."""
    attention_width = shape.heads * shape.head_size
    projections = shape.width * (2 * attention_width + 2 * shape.kv_heads * shape.head_size)
    layer = projections + 3 * shape.width * shape.inner
    return shape.layers * sum(2.0 * n * layer + 2.0 * n * n * attention_width for n in lengths)


def measure_build(session: Session, size: str, rows: int, low: int, high: int, batch: int) -> None:
    shape = SHAPES[size]
    model = language_model(shape, dtype=session.dtype, device=session.device).eval()
    peak = matmul_peak(session, 8192 if session.device.type == "cuda" else 512)
    padded_row_s = (useful_flops(shape, [high]) + 2.0 * high * shape.width * shape.vocabulary) / (peak / 3)
    rows = max(batch, min(rows, int(PASS_S / padded_row_s)))
    lengths = mixed_lengths(rows, low, high)
    texts = random_texts(lengths, shape.vocabulary)
    layers = (shape.layers - 1, shape.layers)

    def keep(states: Sequence[Tensor], ends: Tensor) -> None:
        """Copy the last token of every text to the host, as for a cache."""
        torch.stack([s.reshape(-1, shape.width)[ends] for s in states]).to(torch.float16).cpu()

    @torch.inference_mode()
    def padded(module: torch.nn.Module, width: int | None) -> None:
        for start in range(0, rows, batch):
            chosen = texts[start : start + batch]
            wide = width or max(map(len, chosen))
            ids = torch.zeros(len(chosen), wide, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(chosen):
                ids[row, : len(text)], mask[row, : len(text)] = text, 1
            states = module(
                input_ids=ids.to(session.device), attention_mask=mask.to(session.device), output_hidden_states=True
            ).hidden_states
            ends = torch.tensor([row * wide + len(text) - 1 for row, text in enumerate(chosen)])
            keep([states[k] for k in layers], ends.to(session.device))

    @torch.inference_mode()
    def packed(budget: int, project: bool) -> None:
        for chosen in plan_packs(lengths, budget):
            hidden_LTD, bounds = packed_forward(model.base_model, [texts[i] for i in chosen], layers)
            if project:
                model.lm_head(hidden_LTD[-1])
            keep(list(hidden_LTD), bounds[1:] - 1)

    variants = {
        f"padded to {high}, with vocabulary": Variant(lambda: padded(model, high)),
        "padded to the longest, with vocabulary": Variant(lambda: padded(model, None)),
        "padded to the longest, base model": Variant(lambda: padded(model.base_model, None)),
        f"packs of {PACKS[1]}, with vocabulary": Variant(lambda: packed(PACKS[1], True)),
    } | {f"packs of {n}, base model": Variant(lambda n=n: packed(n, False)) for n in PACKS}  # type: ignore[misc]
    variants = session.fitting(f"{size} build", variants)
    if not variants:
        return
    times = interleaved(variants, session.rounds, session.clock, budget_s=30)
    first = next(iter(variants))
    for name in variants:
        used = useful_flops(shape, lengths) / times.median(name) / peak
        tokens = sum(lengths) / times.median(name)
        note = f"{tokens:,.0f} tokens/s, {used:.1%} of the matmul peak of {peak / 1e12:.3g} TFLOP/s"
        session.report.add(Row.of(f"{size} build: {first} / {name}", times.ratio(first, name), note=note))


def measure_step(session: Session, size: str, batch: int, length: int) -> None:
    model = language_model(SHAPES[size], dtype=session.dtype, device=session.device).train()
    task = RetentionTask.of(model, batch, length)
    plain = Plainly(task)
    product = ours(task, plain.optimizer)
    named: dict[str, Callable[[], None]] = {
        PARTS[0]: plain.task_pass,
        PARTS[1]: plain.retention_pass,
        "craft_step": product.step,
        "plain task step": plain.task_step,
        "summed loss": plain.summed,
        "lists and .item()": plain.naive,
    }
    if has_torchjd():
        named["TorchJD PCGrad"] = plain.torchjd
    variants = {name: Variant(run) for name, run in named.items()}
    variants[PARTS[2]] = Variant(plain.update, prepare=plain.task_pass)
    where = f"{size} {batch}x{length}"
    variants = session.fitting(where, variants)
    if not set(PARTS) <= set(variants):
        return
    times = interleaved(variants, session.rounds, session.clock, budget_s=20)
    copy = sum(p.numel() * p.element_size() for p in task.parameters)
    for name in [n for n in variants if n not in PARTS]:
        note = f"{times.median(name) * 1e3:.1f} ms"
        if session.device.type == "cuda":
            note += f", peak {peak_memory(variants[name].run) / copy:.2f} copies of the weights"
        session.report.add(Row.of(f"{where}: {name} / its parts", times.ratio(name, PARTS), note=note))
    product.fill()
    pair = product.gradients
    surgery = {"surgery": Variant(lambda: operate(pair, product.state)), "unit": Variant(lambda: read_and_axpy(pair))}
    times = interleaved(surgery, 2 * session.rounds, session.clock, budget_s=5)
    session.report.add(Row.of(f"{where}: surgery / dot and axpy", times.ratio("surgery", "unit")))
    waits = {name: sum(host_syncs(variants[name].run).values()) for name in variants if name not in PARTS}
    session.report.add(Row(f"{where}: waits of craft_step", waits["craft_step"], "waits", note=str(waits)))


def measure_lora(session: Session, size: str, batch: int, length: int) -> None:
    if reason := missing("peft"):
        session.report.add(Row(f"{size} adapters", None, note=reason))
        return
    measure_adapters(
        session.report, size, batch, length, session.rounds, session.clock, session.device, session.dtype, budget_s=15
    )


def peak_memory(run: Callable[[], None]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def measure_own_waits(session: Session) -> None:
    model, loss, task, anchors = perceptron_task(session.device)
    product = Ours(model.named_parameters(), loss, loss, task, anchors)
    waits = host_syncs(product.step)
    row = Row("waits of craft_step without a model's own", sum(waits.values()), "waits", target="<= 0")
    row.note = ", ".join(f"{place} {count}" for place, count in waits.items())
    session.report.add(row)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SIZES), help="smallest first")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: run with --tiny, which only tests that this script works")
    if options.tiny:
        one_thread()
        where = (torch.device("cpu"), torch.float32, CPU_TIME, 3)
        sizes, cases, build = ["tiny"], ((1, 8),), (6, 4, 32, 2)
    else:
        where = (torch.device("cuda"), torch.bfloat16, CUDA, options.rounds)
        sizes, cases, build = options.sizes, STEP_CASES, (256, 64, 512, 32)
    report = Report("gpu", where[2].name, judge=not options.tiny)
    session = Session(report, *where, end=time.monotonic() + LIMIT_S)
    session.attempt("waits of craft_step", lambda: measure_own_waits(session))
    for size in sizes:
        session.attempt(f"{size} build", lambda size=size: measure_build(session, size, *build))  # type: ignore[misc]
        for batch, length in cases:
            session.attempt(
                f"{size} {batch}x{length}",
                lambda size=size, batch=batch, length=length: measure_step(session, size, batch, length),  # type: ignore[misc]
            )
        session.attempt(f"{size} adapters", lambda size=size: measure_lora(session, size, *cases[-1]))  # type: ignore[misc]
    session.report.finish(options.json)


if __name__ == "__main__":
    main()
