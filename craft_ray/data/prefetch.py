"""Batches prepared by a thread ahead of the step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int) -> Iterator[T]:
    """`make(step)` for each step in order, up to `depth` of them ahead, in a separate thread.

    An error in `make` is raised here, at the step it belongs to. Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        for step in range(start, stop):
            try:
                item: tuple[T | None, BaseException | None] = (make(step), None)
            except BaseException as error:  # passed on, raised by the consumer
                item = (None, error)
            if not put(item) or item[1] is not None:
                return

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
