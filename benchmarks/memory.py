"""Peak memory, of a process or of a GPU."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """The highest resident memory of this process.

    Linux counts it for each address space; `ru_maxrss` also contains the parent that a process was forked from.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """What this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_in_process(function: Callable[..., None], *args: Any) -> int:
    """The peak memory of a new process that calls `function(*args)`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        peak: int = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{args} ended without a result") from None
    process.join()
    return peak


def _report_peak(sender: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    function(*args)
    sender.send(peak_bytes())
