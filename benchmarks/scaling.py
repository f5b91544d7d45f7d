"""The tables of docs/scaling.md, from the formulas of cost_model.py. Counted, not measured.

python -m benchmarks.scaling
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.cost_model import (
    MISTRAL,
    MODELS,
    PALIGEMMA,
    SMOLLM2,
    Anchor,
    Model,
    checkpoint_bytes,
    sent_bytes,
    state_bytes,
    step_flops,
    step_seconds,
    summed_bytes,
    trials_at_once,
)

ANCHORS = (10**4, 10**5, 10**6, 10**7, 10**8)
GPUS = (1, 2, 8, 32, 128, 512)

FLOPS_PER_SECOND = 4e14
"""Assumed: about 40 % of the dense bf16 peak of an H100."""
NETWORK = 50e9
"""Assumed: bytes a second that each GPU sends, 400 Gbit/s."""
STORAGE = 2e9
"""Assumed: bytes a second that one node reads of the shared storage."""

DEFAULTS: dict[Model, Anchor] = {
    SMOLLM2: Anchor(tokens=128, vectors=128, layers=2, suffix=16, input_bytes=512),
    PALIGEMMA: Anchor(tokens=272, vectors=16, layers=2, suffix=16, input_bytes=20_000),
    MISTRAL: Anchor(tokens=512, vectors=512, layers=2, suffix=16, input_bytes=2048),
}
"""Anchors as `craft-ray anchors build` makes them by default: `all` for texts, `suffix` for images."""
SPARSE: dict[Model, Anchor] = {
    SMOLLM2: Anchor(tokens=128, vectors=16, layers=2, suffix=0, input_bytes=512),
    PALIGEMMA: Anchor(tokens=272, vectors=1, layers=2, suffix=0, input_bytes=20_000),
    MISTRAL: Anchor(tokens=512, vectors=64, layers=2, suffix=0, input_bytes=2048),
}
"""`every_8` for texts, `vision_mean` for images, `anchors.modes: [hidden]`."""

LOCAL = 8
"""Samples of a worker's step, and as many anchors."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def scaled(value: float, unit: str) -> str:
    """With the decimal prefix that fits, two digits or more."""
    for factor, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            number = value / factor
            return f"{number:.1f} {prefix}{unit}" if number < 10 else f"{number:.0f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def duration(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def a_step(model: Model) -> int:
    anchor = DEFAULTS[model]
    tokens = anchor.tokens + anchor.suffix
    return step_flops(model, tokens, anchor.suffix, LOCAL, tokens, LOCAL)


def models() -> str:
    head = ("model", "parameters", "forward pass of an anchor", "state of a worker, float32", "the same, bfloat16",
            "checkpoint, float32")  # fmt: skip
    return table(
        head,
        (
            (
                m.name,
                f"{m.parameters:,}",
                scaled(m.forward_flops(DEFAULTS[m].tokens), "FLOP"),
                scaled(state_bytes(m.parameters), "B"),
                scaled(state_bytes(m.parameters, 2), "B"),
                scaled(checkpoint_bytes(m.parameters), "B"),
            )
            for m in MODELS
        ),
    )


def caches() -> str:
    kinds = [(m, what, of[m]) for m in MODELS for what, of in (("default", DEFAULTS), ("sparse", SPARSE))]
    head = ("model", "anchors", "vectors", "an anchor", *(f"10^{len(str(a)) - 1}" for a in ANCHORS))
    return table(
        head,
        (
            (
                m.name,
                what,
                str(anchor.vectors),
                scaled(anchor.stored_bytes(m), "B"),
                *(scaled(a * anchor.stored_bytes(m), "B") for a in ANCHORS),
            )
            for m, what, anchor in kinds
        ),
    )


def builds() -> str:
    head = ("model", "an anchor", "anchors", *(f"{g} GPU" for g in GPUS), "the final check, one node")

    def row(m: Model, count: int) -> tuple[str, ...]:
        anchor = DEFAULTS[m]
        seconds = count * anchor.build_flops(m) / FLOPS_PER_SECOND
        last = count * anchor.stored_bytes(m) / STORAGE
        times = tuple(duration(seconds / g) for g in GPUS)
        return m.name, scaled(anchor.build_flops(m), "FLOP"), f"10^{len(str(count)) - 1}", *times, duration(last)

    return table(head, (row(m, count) for m in MODELS for count in ANCHORS))


def steps() -> str:
    head = ("model", "a worker's step", "given to all-reduce", "sent by each of 512", "computing",
            *(f"network, {w} workers" for w in GPUS[1:]), "computing's part at 512")  # fmt: skip

    def row(m: Model) -> tuple[str, ...]:
        flops = a_step(m)
        times = [step_seconds(m, flops, w, FLOPS_PER_SECOND, NETWORK) for w in GPUS[1:]]
        compute, network = times[-1]
        return (
            m.name,
            scaled(flops, "FLOP"),
            scaled(summed_bytes(m.parameters), "B"),
            scaled(sent_bytes(m.parameters, 512), "B"),
            duration(compute),
            *(duration(t) for _, t in times),
            f"{compute / (compute + network):.0%}",
        )

    return table(head, map(row, MODELS))


def sweeps() -> str:
    head = ("model", "a trial of 1000 steps", "at once on 8 / 64 / 512 GPUs", "64 trials on 8 / 64 / 512",
            "checkpoints of 64 trials, one each")  # fmt: skip

    def row(m: Model) -> tuple[str, ...]:
        trial = 1000 * a_step(m) / FLOPS_PER_SECOND
        counts = [trials_at_once(g, 1) for g in (8, 64, 512)]
        times = [duration(trial * -(-64 // min(c, 64))) for c in counts]
        kept = scaled(64 * checkpoint_bytes(m.parameters), "B")
        return m.name, duration(trial), " / ".join(map(str, counts)), " / ".join(times), kept

    return table(head, map(row, MODELS))


TABLES = {"models": models, "caches": caches, "builds": builds, "steps": steps, "sweeps": sweeps}


def main() -> None:
    for name, make in TABLES.items():
        print(f"<!-- {name} -->\n{make()}\n")


if __name__ == "__main__":
    main()
