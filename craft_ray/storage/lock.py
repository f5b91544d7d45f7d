"""One process at a time: who builds a cache, trains a run or carries a sweep claims its folder first.

On a disk or a mount the claim is a lock of the system, which goes with its process. An object store has none: there it
is an object that its owner keeps changing, and that nobody honours once it stands still.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from craft_ray.errors import CraftError, StorageError
from craft_ray.storage.paths import ObjectPath, StoragePath

BEAT_S = 5.0
"""Time between two changes of a claim in an object store."""
DEAD_S = 20.0
"""Time without a change after which its owner counts as lost."""
SETTLE_S = 1.0
"""Time in which two that claim at once have both written; the later one has it."""
POLL_S = 0.5


@contextmanager
def exclusive_lock(place: StoragePath, refusal: CraftError, wait_s: float = 0.0) -> Iterator[None]:
    """Hold `place` while the body runs.

    Args:
        refusal: raised where another process holds it for longer than `wait_s`.
    """
    with _locked(place, refusal, wait_s) if isinstance(place, Path) else _leased(place, refusal, wait_s):
        yield


@contextmanager
def _locked(path: Path, refusal: CraftError, wait_s: float) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait_s
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise refusal from None
                time.sleep(POLL_S)
        yield


@contextmanager
def _leased(place: ObjectPath, refusal: CraftError, wait_s: float) -> Iterator[None]:
    owner, done = uuid.uuid4().hex, threading.Event()
    _wait_for(place, refusal, wait_s)

    def beat() -> None:
        place.write_bytes(json.dumps({"owner": owner, "beat": uuid.uuid4().hex}).encode())

    def keep() -> None:
        while not done.wait(BEAT_S):
            with suppress(StorageError):  # the next beat may arrive; where none does, the owner's own writing fails
                beat()

    beat()
    time.sleep(SETTLE_S)
    if _owner(place) != owner:
        raise refusal
    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        if _owner(place) == owner:
            place.unlink(missing_ok=True)


def _wait_for(place: ObjectPath, refusal: CraftError, wait_s: float) -> None:
    """Until nobody holds it. One that still changes is refused as soon as it was waited for."""
    end = time.monotonic() + wait_s
    last, since, changed = _content(place), time.monotonic(), False
    while last is not None:
        time.sleep(POLL_S)
        now = _content(place)
        if now != last:
            last, since, changed = now, time.monotonic(), True
        if now is None or time.monotonic() - since >= DEAD_S:
            return
        if changed and time.monotonic() >= end:
            raise refusal


def _content(place: ObjectPath) -> str | None:
    try:
        return place.read_text()
    except FileNotFoundError:
        return None


def _owner(place: ObjectPath) -> str | None:
    content = _content(place)
    return None if content is None else str(json.loads(content)["owner"])
