"""Processes that preprocess samples alongside the training loop (`train.loader_workers`).

A sample is a function of its row, so it does not matter which process makes it: a run with loaders is the same run.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import TypeVar

from craft_ray.errors import CraftError
from craft_ray.models.base import Features
from craft_ray.models.weightless import received, without_weights

Key = TypeVar("Key")

WATCH_S = 2.0
"""Seconds after which the loaders of a process that was killed end."""


class Loader:
    """A pool of processes that preprocess samples. They start with the first ones.

    Args:
        count: the number of processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._folder = tempfile.TemporaryDirectory(prefix="craft-loader-")
        # A forked process would share the locks and GPU contexts of this one.
        self._pool = ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), initializer=_start, initargs=(os.getpid(),)
        )
        self._sent: dict[int, tuple[Path, object]] = {}

    def map(self, make: Callable[[Key], Features], keys: Sequence[Key]) -> list[Features]:
        """`make` of each key; it must be picklable, apart from the modules of its model.

        Raises:
            CraftError: `make` does, or a process died.
        """
        path = self._path(make)
        try:
            futures = [self._pool.submit(_make, path, key) for key in keys]
            return [pickle.loads(future.result()) for future in futures]  # of our own processes
        except BrokenProcessPool:
            raise CraftError(
                f"one of the train.loader_workers={self.count} processes that preprocess samples died, often for lack "
                f"of memory: set fewer, and resume the run"
            ) from None

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._folder.cleanup()

    def _path(self, make: Callable[[Key], Features]) -> Path:
        """The file from which the processes read `make`, once each: it holds a tokenizer."""
        if id(make) not in self._sent:
            path = Path(self._folder.name) / f"{len(self._sent)}.pickle"
            path.write_bytes(without_weights(make))
            self._sent[id(make)] = path, make  # held, so that no other object has its id
        return self._sent[id(make)][0]


def _start(parent: int) -> None:
    """Prepare a process of the pool."""
    import torch

    from craft_ray.quiet import quiet_libraries

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the run ends its processes itself
    quiet_libraries()
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when the run's process is gone: the pool itself would wait for ever."""
    wait = threading.Event()
    while os.getppid() == parent:
        wait.wait(WATCH_S)
    os._exit(1)


def _make(path: Path, key: object) -> bytes:
    # Pickled here: torch would pass each tensor as a file descriptor in shared memory, of which there are few.
    return pickle.dumps(_opened(path)(key), protocol=pickle.HIGHEST_PROTOCOL)


@cache
def _opened(path: Path) -> Callable[[object], Features]:
    make: Callable[[object], Features] = received(path.read_bytes())
    return make
