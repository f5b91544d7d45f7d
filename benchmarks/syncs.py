"""Counting how often the host waits for the device.

On a GPU torch itself reports it. On a CPU nothing has to wait, but the same operations run, so the ones that would wait
on a GPU are counted: an element read as a number, and results whose shape depends on values.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense",  # item(), float(), bool(), `if tensor`
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave",
    "bincount",
}
INDEXING = {"index", "index_put", "index_put_"}
"""Operations that wait if an index is a mask, which is converted to positions."""


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name = func.overloadpacket.__name__
        masks = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in WAITING or masks:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def host_syncs(function: Callable[[], Any]) -> Counter[str]:
    """The operations in `function` that wait for a device, with their counts. It is called once before counting."""
    function()
    if torch.cuda.is_available():
        return _cuda_syncs(function)
    with _Counter() as counter:
        function()
    return counter.waits


def _cuda_syncs(function: Callable[[], Any]) -> Counter[str]:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename.rsplit('/', 1)[-1]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return Counter(places)
