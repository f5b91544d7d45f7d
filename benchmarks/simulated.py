"""What a worker of 1 to 512 holds and sends, for models that no machine here could run: simulated, and checked.

The product's own step (sharding, both gradients, surgery, AdamW) runs on tensors without data, in a process group
without other processes; so every tensor appears with its size, and every collective with its bytes. It is compared
with real processes (gloo) of a small model: the same numbers counted there, at most 5 % off, and resident memory.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.adapters import LORA
from benchmarks.harness import WALL, Report, Row, arguments
from benchmarks.ledger import Ledger
from benchmarks.memory import peak_bytes, resident_bytes
from benchmarks.sharding import on_workers
from benchmarks.simulated_models import MODELS
from craft_ray.config import CraftConfig
from craft_ray.method.distance import hidden_loss
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import GradientPair, local_part
from craft_ray.method.pooling import Layout, Pooling, Vectors
from craft_ray.method.step import craft_step
from craft_ray.models.adapting import attach
from craft_ray.models.sharding import base_forward, find_blocks, shard
from craft_ray.models.tokens import token_loss
from craft_ray.workers import OneWorker, ProcessGroup, Workers

FEW = 3
"""Layers of each kind that are simulated: one computes while the next is gathered and the one before is freed."""
COUNTS = (2, 4, 8, 32, 64, 512)
"""Workers in the tables; the bytes of a replica do not depend on their number, but one alone sends nothing."""
SETTLED_S = 0.3


@dataclass(frozen=True)
class Case:
    """A run to simulate."""

    model: str
    adapter: bool = False
    sharded: bool = True
    precision: str = "bf16"
    checkpointing: bool = True


@dataclass(frozen=True)
class Bytes:
    """What one worker holds and sends in a step."""

    weights: int
    gradients: int
    moments: int
    gathered: int
    """Weights that it computes with at a time: those outside the blocks and the largest block's; 0 if not sharded."""
    activations: int
    """What the forward pass of the task keeps for its backward pass."""
    peak: int
    """The most that lives at a time, the state included."""
    all_gather: int
    reduce_scatter: int
    all_reduce: int

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.moments

    def sent(self, workers: int) -> float:
        """Bytes that each worker sends in a step where collectives go round a ring."""
        part = (workers - 1) / workers
        return part * (self.all_gather + self.reduce_scatter + 2 * self.all_reduce)


@dataclass(frozen=True)
class Batch:
    """One sample, for either loss."""

    inputs: dict[str, Tensor]
    count: int
    pooling: Pooling
    teacher: Vectors


class Losses:
    """The two losses as the product computes them, on one sample of one length."""

    def __init__(self, module: Any, case: Case) -> None:
        self.module, self.precision = module, case.precision
        shape = MODELS[case.model]
        states, width = module.config.num_hidden_layers, module.config.hidden_size
        self.layers = (states - 1, states)
        layout = Layout(shape.tokens, shape.tokens - shape.suffix)
        pooling = Pooling.plan([layout], ("suffix" if shape.suffix else "all",), shape.tokens)
        vectors = torch.zeros(1, 2, pooling.valid_BV.shape[1], width, dtype=torch.float16)
        teacher = Vectors(vectors, pooling.valid_BV)
        ids = torch.ones(1, shape.tokens, dtype=torch.long)
        self.batch = Batch({"input_ids": ids}, shape.tokens - 1, pooling, teacher)
        self.after_forward: Callable[[], None] = lambda: None

    def _autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def task(self, batch: Batch) -> Tensor:
        with self._autocast():
            logits_1SV = self.module(**batch.inputs, use_cache=False).logits
        loss = token_loss(logits_1SV[:, :-1].flatten(0, 1), batch.inputs["input_ids"][:, 1:].flatten(), batch.count)
        del logits_1SV
        self.after_forward()
        return loss

    def retention(self, batch: Batch) -> Tensor:
        with self._autocast():
            base = base_forward(self.module)
            states = base(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
        return hidden_loss(batch.pooling([states[k] for k in self.layers]), batch.teacher)


def made(case: Case, layers: tuple[int, ...] | None = None) -> Any:
    """The model in training, without its adapter; with its own numbers of layers, or with others."""
    module: Any = MODELS[case.model].make(*(layers or MODELS[case.model].layers)).train()
    return module.to(torch.bfloat16) if case.adapter else module


def adapt(case: Case, module: Any) -> None:
    """Put the adapter into a model, sharded or not; each worker has all of it."""
    model: Any = SimpleNamespace(module=module, adapter=None, merged_adapter=None)
    with unset_fake_temporarily() as simulated:  # PEFT moves what it makes, which tensors without data do not allow
        attach(model, LORA, SimpleNamespace(path=case.model, revision=None), "-")  # type: ignore[arg-type]
    if simulated is not None:
        for name, part in module.named_modules():
            if ".lora_" in name:
                emptied(part)


def measure(workers: Workers, case: Case, module: Any, mesh: DeviceMesh | None) -> Bytes:
    """One step of a run that has its moments."""
    if case.checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    block, rest = 0, 0
    if mesh is not None:
        block, rest = gathered_bytes(module, case.precision)
        shard(module, mesh, case.precision)
    if case.adapter:
        adapt(case, module)
    shards = mesh is not None and not case.adapter
    pair = GradientPair(module.named_parameters(), sharded=module if shards else None)
    pair.restore_reached([True] * len(pair.parameters))  # otherwise the workers would agree on it, by values
    optimizer = torch.optim.AdamW(pair.parameters, lr=1e-5, fused=True)
    pair.assign_grads(workers)
    optimizer.step()  # allocates the moments
    moments = [t for held in optimizer.state.values() for t in held.values() if t.ndim]
    losses, craft = Losses(module, case), CraftConfig(epsilon_start=0.1)
    kept = []
    with Ledger() as ledger:
        ledger.hold([*module.parameters(), *module.buffers(), *pair.buffers, *moments])
        before = ledger.live
        losses.after_forward = lambda: kept.append((ledger.live if kept else _settled(ledger)) - before)
        craft_step(
            losses.task, [losses.batch], losses.retention, [losses.batch], DualState.start(craft), 0.1,
            craft=craft, optimizer=optimizer, gradients=pair, workers=workers, max_norm=1.0,
        )  # fmt: skip
    return Bytes(
        weights=_bytes(module.parameters()),
        gradients=_bytes(pair.buffers),
        moments=_bytes(moments),
        gathered=block + rest,
        activations=kept[0] - rest,
        peak=ledger.peak,
        all_gather=ledger.collectives["all-gather"],
        reduce_scatter=ledger.collectives["reduce-scatter"],
        all_reduce=ledger.collectives["all-reduce"],
    )


def _settled(ledger: Ledger) -> int:
    """The live bytes when the threads that send between real processes have let go of what they sent: on a busy machine
    they hold it a little longer."""
    found = ledger.live
    if dist.is_initialized() and dist.get_backend() == "gloo":
        deadline = time.monotonic() + SETTLED_S
        while time.monotonic() < deadline:
            time.sleep(0.01)
            found = min(found, ledger.live)
    return found


def gathered_bytes(module: nn.Module, precision: str) -> tuple[int, int]:
    """Bytes of the largest block, and of the weights outside the blocks, as they are computed with."""

    def size(part: nn.Module) -> int:
        return sum(p.numel() * (2 if precision == "bf16" else p.element_size()) for p in part.parameters())

    blocks = [size(block) for block in find_blocks(module)]
    return max(blocks), size(module) - sum(blocks)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in map(local_part, tensors))


def emptied(module: Any) -> Any:
    """The module with newly allocated tensors, without values."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return module


def simulate(case: Case, workers: int) -> Bytes:
    """One of this many workers, none of which exists. Layers are alike, so each number grows by the same with each:
    it is counted with a few of them and with two more of one kind."""
    layers = MODELS[case.model].layers
    few = [min(FEW, number) for number in layers]
    found = asdict(simulate_layers(case, workers, *few))
    total = dict(found)
    for kind, number in enumerate(layers):
        if number > FEW:
            more = asdict(simulate_layers(case, workers, *(n + 2 * (k == kind) for k, n in enumerate(few))))
            for key, value in found.items():
                total[key] += (more[key] - value) * (number - FEW) // 2
    return Bytes(**total)


def simulate_layers(case: Case, workers: int, *layers: int) -> Bytes:
    """One of this many workers, which trains a model with these numbers of layers."""
    with torch.device("meta"):
        module = made(case, layers)
    if workers > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=workers)
    try:
        mesh = init_device_mesh("cpu", (workers,)) if workers > 1 and case.sharded else None
        group = ProcessGroup(torch.device("cpu")) if workers > 1 else OneWorker()
        with FakeTensorMode():
            return measure(group, case, emptied(module), mesh)
    finally:
        if workers > 1:
            dist.destroy_process_group()


def real(workers: Workers, case: Case) -> tuple[dict[str, int], int]:
    """The same on one of several processes, and its highest resident memory above what it held before the model."""
    mesh = init_device_mesh("cpu", (workers.world_size,)) if workers.world_size > 1 and case.sharded else None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident_bytes()
    return asdict(measure(workers, case, made(case), mesh)), peak_bytes() - before


def check(report: Report, model: str, counts: Iterable[int]) -> None:
    """Compare each number with that of real processes, at most 5 % off."""
    cases = {
        "sharded": Case(model, precision="fp32"),
        "sharded, bf16": Case(model),
        "replicated": Case(model, sharded=False, precision="fp32"),
        "LoRA": Case(model, adapter=True, sharded=False, precision="fp32"),
        "LoRA, sharded": Case(model, adapter=True, precision="fp32"),
    }
    for count in counts:
        for name, case in cases.items():
            expected = asdict(simulate_layers(case, count, *MODELS[model].layers))
            found = on_workers(count, real, case)
            measured = [numbers for numbers, _ in found]
            off = {}
            for key, value in expected.items():
                highest = max(numbers[key] for numbers in measured)
                off[key] = abs(value / highest - 1) if highest else float(value > 0)
            worst = max(off, key=lambda key: off[key])
            what = f"{model}: {name}, {count} processes"
            note = f"{len(off)} numbers, farthest off: {worst}"
            report.add(
                Row(
                    f"{what}, simulated / counted, off by at most",
                    100 * off[worst],
                    "percent",
                    target="<= 5",
                    note=note,
                )
            )
            resident = max(peak for _, peak in found) / expected["peak"]
            report.add(Row(f"{what}, highest resident memory, loading included / simulated peak", resident))


def tables() -> None:
    """The tables of docs/scaling.md, in GB."""
    for model in ("pi0_fast", "7B", "70B"):
        for name, case, counts in (
            ("all weights, replicated", Case(model, sharded=False), (1, 8)),
            ("all weights, sharded", Case(model), COUNTS),
            ("LoRA", Case(model, adapter=True, sharded=False), (1, 8)),
            ("LoRA, sharded", Case(model, adapter=True), COUNTS),
        ):
            for count in counts:
                found = simulate(case, count)
                parts = [*asdict(found).values(), found.sent(count)]
                print(f"| {model}, {name} | {count} |", " | ".join(f"{n / 1e9:.4g}" for n in parts), "|", flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/scaling.md instead")
    options = parser.parse_args()
    if options.tables:
        tables()
        return
    report = Report("simulated", WALL.name, judge=not options.tiny)
    check(report, "tiny" if options.tiny else "small", (2,) if options.tiny else (2, 4))
    report.finish(options.json)


if __name__ == "__main__":
    main()
