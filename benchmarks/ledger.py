"""Bytes of tensors that live at a time, and bytes of collectives, of real tensors or of simulated ones.

Every operation's new memory is counted until it is freed. What a kernel needs inside, and what the allocator keeps or
wastes, is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

COLLECTIVES = {
    "c10d._allgather_base_": ("all-gather", 0),
    "c10d._reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d.allreduce_": ("all-reduce", 0),
}
"""Operations of torch.distributed, their names, and which argument is whole: a gather's result, what is
scattered, what is reduced."""


class Ledger(TorchDispatchMode):
    """While open, counts live bytes, their peak, and the bytes of collectives by kind.

    The memory must be allocated while it is open, or be given to `hold`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.collectives: Counter[str] = Counter()
        """Bytes of the whole tensors, by kind of collective."""
        self._entries: Any = WeakIdKeyDictionary()
        """Bytes by storage, in lists of one number."""
        self._resize = torch.UntypedStorage.resize_

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._note(tensor.to_local() if isinstance(tensor, DTensor) else tensor)

    def restart(self) -> None:
        """Forget the peak and the collectives so far."""
        self.peak = self.live
        self.collectives.clear()

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._entries:
            entry = self._entries[storage] = [0]
            weakref.finalize(storage, self._set, entry, 0)
            self._set(entry, storage.nbytes())

    def _set(self, entry: list[int], size: int) -> None:
        self.live += size - entry[0]
        self.peak = max(self.peak, self.live)
        entry[0] = size

    def __enter__(self) -> Self:
        resize, ledger = self._resize, self

        def counted(storage: Any, size: int) -> Any:
            resize(storage, size)  # FSDP frees and allocates gathered weights this way, without an operation
            if storage in ledger._entries:
                ledger._set(ledger._entries[storage], size)

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # the operations on its local part are counted
        result = func(*args, **(kwargs or {}))
        name = str(func).rpartition(".")[0]
        if name in COLLECTIVES:
            kind, whole = COLLECTIVES[name]
            self.collectives[kind] += sum(t.nbytes for t in tree_leaves(args[whole]) if isinstance(t, Tensor))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result
