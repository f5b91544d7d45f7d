"""The two gradients in flat memory, with their dot product, cosine and norms.

Row 0 of a buffer is the task gradient g_t, row 1 the retention gradient g_r; every parameter's `.grad` is a view
into one of the rows. So the two are paired by position by construction, a parameter that only one loss reaches has
zeros in the other row, and a comparison is one pass over contiguous memory.

Where FSDP2 shards the parameters (`torch.distributed.fsdp.fully_shard`), the rows hold only the local shards: FSDP
reduces each gradient into them during the backward pass, averaged over the workers, and the three numbers of the Gram
matrix are all that is summed over the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from craft_ray.errors import ModelError
from craft_ray.method.gram import BLOCK, Gram, gram_sums
from craft_ray.method.overlap import AllReduce, BucketedSum, Span

TASK, RETENTION = 0, 1

IN_CACHE = 1 << 19
"""Elements that a CPU combines at a time: they are still in its cache when they are scaled."""


class Counted(Protocol):
    """A micro-batch that knows how many terms (tokens, samples) its mean loss averages."""

    @property
    def count(self) -> int: ...


class Parted(Protocol):
    """A micro-batch with terms of several losses, which knows how many of each it has."""

    @property
    def counts_S(self) -> Tensor: ...


AnyBatch = TypeVar("AnyBatch")


class GradientPair:
    """The task and the retention gradient of `parameters`, in one flat [2, P] buffer per dtype.

    The memory beyond ordinary training is one copy of the gradients, the second row. `with_retention=False`
    leaves it out (the baseline arm, and a run that needs no angle between the two). With `short_retention` it is
    bfloat16: the retention gradient is computed first, in the row of the task gradient, and rounded once.

    Args:
        parameters: named parameters; those that do not require a gradient are skipped.
        sharded: the module that `fully_shard` made of the one with these parameters, if they are sharded.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        with_retention: bool = True,
        short_retention: bool = False,
        sharded: FSDPModule | None = None,
    ) -> None:
        if sharded is not None:
            sharded.reshard()  # a pass without gradients leaves the root's parameters gathered
        named = [(name, p) for name, p in parameters if p.requires_grad]
        assert named, "no parameter requires a gradient"
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self._sharded = sharded
        local = [local_part(p) for p in self.parameters]
        self.retention_first = with_retention and short_retention
        """Whether the retention gradient must be computed before the task gradient, in whose row it begins."""
        rows = 2 if with_retention and not short_retention else 1
        self.buffers: list[Tensor] = []
        views: dict[int, list[Tensor]] = {}
        spans: dict[int, Span] = {}
        for dtype in dict.fromkeys(p.dtype for p in self.parameters):
            group = [i for i, p in enumerate(self.parameters) if p.dtype == dtype]
            size = sum(local[i].numel() for i in group)
            padded = max(-(-size // BLOCK), 1) * BLOCK
            buffer = torch.zeros(rows, padded, dtype=dtype, device=local[group[0]].device)
            self.buffers.append(buffer)
            start = 0
            for i in group:
                p, part = self.parameters[i], local[i]
                views[i] = [as_shard(buffer[row, start : start + part.numel()].view_as(part), p) for row in range(rows)]
                spans[i] = Span(len(self.buffers) - 1, start, start + part.numel())
                start += part.numel()
        self.short: list[Tensor] = []
        """The retention gradient in bfloat16, [P] for each buffer, if it is kept so."""
        if self.retention_first:
            self.short = [torch.zeros_like(buffer[0], dtype=torch.bfloat16) for buffer in self.buffers]
        self.views = [[views[i][row] for i in range(len(named))] for row in range(rows)]
        self._reached = [False] * len(named)
        self._handles = [p.register_post_accumulate_grad_hook(self._marker(i)) for i, p in enumerate(self.parameters)]
        self._agreed: list[bool] | None = None
        self._sum = BucketedSum([spans[i] for i in range(len(named))], [b.element_size() for b in self.buffers])

    def _marker(self, index: int) -> Callable[[Tensor], None]:
        def mark(_: Tensor) -> None:
            self._reached[index] = True
            self._sum.ready(index)

        return mark

    @property
    def reached(self) -> list[bool]:
        """Which parameters have had a gradient so far; part of a checkpoint."""
        return list(self._reached)

    def restore_reached(self, reached: Sequence[bool]) -> None:
        assert len(reached) == len(self._reached)
        self._reached = list(reached)
        self._agreed = list(reached)

    def close(self) -> None:
        """Remove hooks and gradients from the parameters."""
        for handle in self._handles:
            handle.remove()
        for p in self.parameters:
            p.grad = None

    def backward(
        self, row: int, loss_of: Callable[[Any], Tensor], micro_batches: Sequence[Counted], workers: AllReduce
    ) -> Tensor:
        """Fill a row with the gradient of the mean loss over all micro-batches of all workers.

        Each micro-batch's mean is weighted by its number of terms, so that neither accumulation nor the number
        of workers changes the loss that is minimised.

        Returns:
            That mean loss, a detached float32 scalar on the device.

        Raises:
            ModelError: the loss depends on none of the parameters.
        """
        held = self._start(row)
        total = sum(batch.count for batch in micro_batches)
        # Gradients are summed over the workers during the backward pass, so each worker's weight is applied before.
        (share,) = self._shares([total], workers)
        weight = share * self._averaged_over(workers)
        losses = []
        for batch in self._summed_at_the_last(micro_batches, held, workers):
            loss = self._trained(loss_of(batch), row)
            if len(micro_batches) > 1:
                loss = loss * (batch.count / total)
            (loss * weight).to(loss.dtype).backward()
            losses.append(loss.detach().float())
        mean = (losses[0] if len(losses) == 1 else torch.stack(losses).sum()) * share
        if workers.world_size > 1:
            workers.all_reduce(mean)
        self._finish_sum(workers)
        self._keep(row)
        return mean.float()

    def _summed_at_the_last(
        self, micro_batches: Sequence[AnyBatch], held: int, workers: AllReduce, last: bool = True
    ) -> Iterator[AnyBatch]:
        """The micro-batches; gradients are summed over the workers only in the backward pass of the last one.

        Args:
            held: the row of the gradients.
            last: whether no further pass adds to the row: replicas sum only then. Shards are summed in each pass, as
                they can be added up: whole gradients, kept from one loss to the next, would take the memory of a row
                as often as there are workers.
        """
        for index, batch in enumerate(micro_batches):
            final = index == len(micro_batches) - 1
            if self._sharded is not None:  # until then each worker keeps whole gradients
                self._sharded.set_requires_gradient_sync(final)
            elif final and last and workers.world_size > 1:
                self._sum.begin([buffer[held] for buffer in self.buffers], workers)
            yield batch

    def _finish_sum(self, workers: AllReduce) -> None:
        if self._sharded is None and workers.world_size > 1:
            self._sum.finish()

    def backward_parts(
        self,
        row: int,
        sums_of: Callable[[Any], Tensor],
        micro_batches: Sequence[Parted],
        weights_S: Tensor,
        workers: AllReduce,
    ) -> Tensor:
        """Fill a row with the gradient of sum_i w_i L_i, in one backward pass per micro-batch however many losses there
        are. L_i is the mean over its own terms in all micro-batches of all workers.

        Args:
            sums_of: from a micro-batch to the sum of each loss's terms, [S].
            weights_S: w, on the device.

        Returns:
            The losses L, [S], detached in float32 on the device.

        Raises:
            ModelError: no loss depends on a parameter.
        """
        held = self._start(row)
        losses_S = self._add_parts((weights_S, sums_of, micro_batches), held, workers)
        self._finish_sum(workers)
        self._keep(row)
        return losses_S

    def _add_parts(
        self, parts: tuple[Tensor, Callable[[Any], Tensor], Sequence[Parted]], held: int, workers: AllReduce
    ) -> Tensor:
        """Add the gradient of sum_i w_i L_i to what the parameters' gradients hold; the L_i."""
        weights_S, sums_of, micro_batches = parts
        counts_S = torch.stack([batch.counts_S for batch in micro_batches]).sum(0, dtype=torch.float64)
        if workers.world_size > 1:
            workers.all_reduce(counts_S)
        counts_S = counts_S.clamp(min=1)  # a loss without a term in this batch is 0
        total_S = torch.zeros_like(counts_S)
        factors_S = weights_S / counts_S * self._averaged_over(workers)
        for batch in self._summed_at_the_last(micro_batches, held, workers):
            sums_S = self._trained(sums_of(batch), RETENTION)
            (sums_S * factors_S.to(sums_S.dtype)).sum().backward()
            total_S += sums_S.detach()
        if workers.world_size > 1:
            workers.all_reduce(total_S)
        return (total_S / counts_S).float()

    def backward_sum(
        self,
        terms: Sequence[tuple[Tensor | float, Callable[[Any], Tensor], Sequence[Counted]]],
        workers: AllReduce,
        parts: tuple[Tensor, Callable[[Any], Tensor], Sequence[Parted]] | None = None,
    ) -> list[Tensor]:
        """Fill row 0 with the gradient of a sum of losses, each times its factor: one row, and one reduction of
        replicas. Where the parameters are sharded, each loss is reduced once, onto the shards of that row.

        Args:
            terms: for each loss its factor, the loss of a micro-batch, and this worker's micro-batches.
            parts: several more losses in one pass: their factors, their sums and micro-batches, as in `backward_parts`.

        Returns:
            Each mean loss over all micro-batches of all workers, without its factor, as in `backward`; at the end the
            losses of `parts`, [S].

        Raises:
            ModelError: a loss depends on none of the parameters.
        """
        self._start(TASK)
        counts = [sum(batch.count for batch in batches) for _, _, batches in terms]
        shares = self._shares(counts, workers)
        means = []
        for row, ((factor, loss_of, batches), count, share) in enumerate(zip(terms, counts, shares, strict=True)):
            losses = []
            weight = factor * share * self._averaged_over(workers)
            last = parts is None and row == len(terms) - 1
            for batch in self._summed_at_the_last(batches, TASK, workers, last):
                loss = self._trained(loss_of(batch), row) * (batch.count / count)
                (loss * weight).to(loss.dtype).backward()
                losses.append(loss.detach().float())
            means.append(torch.stack(losses).sum() * share)
        several = [] if parts is None else [self._add_parts(parts, TASK, workers)]
        if workers.world_size > 1:
            together = torch.stack(means)
            workers.all_reduce(together)
            means = list(together)
            self._finish_sum(workers)
        return [mean.float() for mean in [*means, *several]]

    def _shares(self, counts: Sequence[int], workers: AllReduce) -> Sequence[Tensor | float]:
        """This worker's share of the terms that each mean loss averages."""
        if workers.world_size == 1:
            return [1.0] * len(counts)
        own = torch.tensor(counts, dtype=torch.float64, device=self.buffers[0].device)
        every = own.clone()
        workers.all_reduce(every)
        return list(own / every)

    def _averaged_over(self, workers: AllReduce) -> int:
        """The number of workers whose gradients a backward pass averages: all of them if it is sharded."""
        return 1 if self._sharded is None else workers.world_size

    def _start(self, row: int) -> int:
        """Let the parameters' gradients begin at zero in the row where those of `row` are computed; that row."""
        held = TASK if self.retention_first else row
        for buffer in self.buffers:
            buffer[held].zero_()
        for p, view in zip(self.parameters, self.views[held], strict=True):
            p.grad = view
        return held

    def _keep(self, row: int) -> None:
        """Round a retention gradient that was computed in the row of the task gradient."""
        if row == RETENTION:
            for buffer, short_P in zip(self.buffers, self.short, strict=False):
                short_P.copy_(buffer[TASK])

    def _trained(self, loss: Tensor, row: int) -> Tensor:
        if not loss.requires_grad:
            raise ModelError(
                f"the {('task', 'retention')[row]} loss depends on no weight that is trained: unfreeze some, or choose "
                f"other adapter.target_modules, or other layers to anchor"
            )
        return loss

    def gram(self) -> Gram:
        """Dot product and squared norms of the two gradients, in one pass; of shards, summed once."""
        gram = gram_sums(self._pairs())
        if self._sharded is not None:
            dist.all_reduce(gram, group=self._shard_group())
        return Gram(dot=gram[0, 1], task_sq=gram[0, 0], retention_sq=gram[1, 1])

    def _pairs(self) -> list[Any]:
        """Both gradients of each buffer: [2, P], or two of [P]."""
        if not self.short:
            return list(self.buffers)
        return [(buffer[TASK], short_P) for buffer, short_P in zip(self.buffers, self.short, strict=True)]

    def _shard_group(self) -> dist.ProcessGroup:
        """The workers that hold one copy of the parameters together; they are the mesh's last dimension."""
        p = self.parameters[0]
        assert isinstance(p, DTensor)
        return p.device_mesh.get_group(p.device_mesh.ndim - 1)

    def clip(self, max_norm: float | None) -> Tensor:
        """Clip the gradients that `assign_grads` handed out to a norm, as `clip_grad_norm_` does.

        Returns:
            Their norm before.
        """
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        clip_grads_with_norm_(self.parameters, torch.inf if max_norm is None else max_norm, norm)
        return norm

    def combine(self, task: Tensor | float, retention: Tensor) -> None:
        """Row 0 <- task * g_t + retention * g_r, in place; `task` must not be zero.

        Computed as task * (g_t + retention/task * g_r), starting at the end, which `gram` left in the CPU's cache.
        """
        plain = isinstance(task, float) and task == 1.0
        ratio = retention if plain else retention / task
        for pair in self._pairs():
            ratio_here = ratio.to(pair[TASK].dtype)
            at_once = len(pair[TASK]) if pair[TASK].is_cuda and not self.short else IN_CACHE
            for task_K, retention_K in reversed(list(zip(*(row.split(at_once) for row in pair), strict=True))):
                task_K.addcmul_(retention_K.to(task_K.dtype), ratio_here)
                if not plain:
                    task_K.mul_(task)

    def assign_grads(self, workers: AllReduce) -> None:
        """Hand row 0 to the optimiser. A parameter that no loss has ever reached has no gradient, as in a plain loop;
        one that is reached only at some steps (an expert without tokens) has a zero gradient at the others."""
        self._agree(workers)
        for p, view, reached in zip(self.parameters, self.views[TASK], self._reached, strict=True):
            p.grad = view if reached else None

    def _agree(self, workers: AllReduce) -> None:
        """At the first step, the workers agree on which parameters are trained."""
        if workers.world_size == 1:
            return
        if self._agreed is None:
            flags = torch.tensor(self._reached, dtype=torch.float32, device=self.buffers[0].device)
            workers.all_reduce(flags)
            self._reached = [bool(flag) for flag in flags.tolist()]
            self._agreed = list(self._reached)
        elif self._agreed != self._reached:
            late = [n for n, a, r in zip(self.names, self._agreed, self._reached, strict=True) if a != r]
            raise ModelError(
                f"{late[0]} had no gradient in the first step and has one now: with several workers the trained "
                f"parameters must be the same at every step; freeze it, or use one worker"
            )


def local_part(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this worker holds; all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_shard(local: Tensor, of: Tensor) -> Tensor:
    """A tensor with this local shard, distributed as `of` is; `local` itself, if `of` is not."""
    if not isinstance(of, DTensor):
        return local
    return DTensor.from_local(local, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride())
