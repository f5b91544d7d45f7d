"""Ways to compare two flat gradients, and to combine them, against one read of both and one axpy.

The reasons for the choices in `GradientPair`. The errors are those of the dot product, relative to |g_t| |g_r|, and of
a sum with one term of four fifths: a float32 accumulator loses small terms next to a large one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import CPU_TIME, Report, Row, Variant, arguments, interleaved, one_thread

Gram = Callable[[Tensor], Tensor]
"""From [2, P] to (|g_t|^2, <g_t, g_r>, |g_r|^2)."""


def blocks(pair_2P: Tensor, size: int) -> Tensor:
    blocks_NB2 = pair_2P.view(2, -1, size).permute(1, 2, 0)
    gram = torch.bmm(blocks_NB2.transpose(1, 2), blocks_NB2).sum(0, dtype=torch.float64)
    return torch.stack([gram[0, 0], gram[0, 1], gram[1, 1]])


def dots(pair_2P: Tensor, size: int) -> Tensor:
    parts: list[Tensor] = []
    for slab in pair_2P.split(size, 1):
        task, retention = slab
        parts += (torch.dot(task, task), torch.dot(task, retention), torch.dot(retention, retention))
    return torch.stack(parts).view(-1, 3).sum(0, dtype=torch.float64)


def products(pair_2P: Tensor, size: int) -> Tensor:
    parts: list[Tensor] = []
    for slab in pair_2P.split(size, 1):
        task, retention = slab
        parts += (torch.mv(slab, task), torch.dot(retention, retention).view(1))
    return torch.cat(parts).view(-1, 3).sum(0, dtype=torch.float64)


def whole(pair_2P: Tensor, scale: Tensor, retention: Tensor) -> None:
    pair_2P[0].mul_(scale)
    pair_2P[0].addcmul_(pair_2P[1], retention)


def slabs(pair_2P: Tensor, scale: Tensor, retention: Tensor, size: int) -> None:
    for slab in reversed(pair_2P.split(size, 1)):
        slab[0].addcmul_(slab[1], retention).mul_(scale)


COMPARISONS: dict[str, Gram] = {
    "comparison, bmm of blocks of 512": lambda pair: blocks(pair, 512),
    "comparison, bmm of blocks of 1024 (the product)": lambda pair: blocks(pair, 1024),
    "comparison, bmm of blocks of 4096": lambda pair: blocks(pair, 4096),
    "comparison, three dots of 2^18": lambda pair: dots(pair, 1 << 18),
    "comparison, mv and dot of 2^17": lambda pair: products(pair, 1 << 17),
    "comparison, mv and dot of 2^19": lambda pair: products(pair, 1 << 19),
    "comparison, three dots of everything": lambda pair: dots(pair, pair.shape[1]),
}


def measure(report: Report, size: int, rounds: int) -> None:
    pair = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    scale, retention = torch.tensor(1 - 1e-7), torch.tensor(1e-4)

    def unit() -> None:
        torch.dot(pair[0], pair[1])
        pair[0].add_(pair[1], alpha=1e-4)

    variants = {"unit": Variant(unit)}
    variants |= {name: Variant(lambda f=f: f(pair)) for name, f in COMPARISONS.items()}  # type: ignore[misc]
    variants |= {
        "combination, mul_ and addcmul_ of everything": Variant(lambda: whole(pair, scale, retention)),
        "combination, in slabs of 2^17": Variant(lambda: slabs(pair, scale, retention, 1 << 17)),
        "combination, in slabs of 2^19 (the product)": Variant(lambda: slabs(pair, scale, retention, 1 << 19)),
    }
    times = interleaved(variants, rounds)
    dominated = torch.ones(2, 1 << 22)
    dominated[:, 0] = 4096.0
    for name in list(variants)[1:]:
        note = ""
        if name in COMPARISONS:
            note = (
                f"error {error(COMPARISONS[name], pair):.0e}, one large term {error(COMPARISONS[name], dominated):.0e}"
            )
        report.add(Row.of(f"{name} / dot and axpy", times.ratio(name, "unit"), note=note))


def error(gram: Gram, pair_2P: Tensor) -> float:
    task, retention = pair_2P.double()
    return abs(gram(pair_2P)[1] - task @ retention).item() / (task.norm() * retention.norm()).item()


def main() -> None:
    options = arguments(__doc__, rounds=15).parse_args()
    one_thread()
    report = Report("surgery", CPU_TIME.name, judge=not options.tiny)
    size, rounds = (1 << 16, 3) if options.tiny else (92 << 20, options.rounds)
    measure(report, size, rounds)
    report.finish(options.json)


if __name__ == "__main__":
    main()
