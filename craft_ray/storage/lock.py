"""One process at a time: a process that builds a cache, trains a run or runs a sweep locks its folder first.

On a disk or a mount this is a file lock of the system, which is released when its process ends. An object store has no
locks: there it is an object that its owner keeps renewing, and that expires once it is no longer renewed.
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

from craft_ray.background import in_background
from craft_ray.errors import CraftError, StorageError
from craft_ray.storage.paths import ObjectPath, StoragePath

RENEW_S = 5.0
"""Time between two renewals of a lock in an object store."""
EXPIRE_S = 20.0
"""Time without a renewal after which the owner counts as lost."""
SETTLE_S = 1.0
"""Time in which two processes that lock at once have both written; the later one gets the lock."""
POLL_S = 0.5


@contextmanager
def exclusive_lock(path: StoragePath, refusal: CraftError, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock `path` while the body runs.

    Args:
        refusal: raised if another process holds the lock for longer than `wait_s`.
    """
    with _file_lock(path, refusal, wait_s) if isinstance(path, Path) else _object_lock(path, refusal, wait_s):
        yield


@contextmanager
def _file_lock(path: Path, refusal: CraftError, wait_s: float) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise StorageError(
            f"{path.parent} cannot be written to ({error.strerror}): make it writable, or choose another folder"
        ) from None
    end = time.monotonic() + wait_s
    with file as lock:
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
def _object_lock(path: ObjectPath, refusal: CraftError, wait_s: float) -> Iterator[None]:
    owner = uuid.uuid4().hex
    _wait_until_free(path, refusal, wait_s)

    def renew() -> None:
        path.write_bytes(json.dumps({"owner": owner, "beat": uuid.uuid4().hex}).encode())

    def renew_until(done: threading.Event) -> None:
        while not done.wait(RENEW_S):
            with suppress(StorageError):  # the next renewal may succeed; if none does, the owner's own writes fail
                renew()

    renew()
    time.sleep(SETTLE_S)
    if _owner(path) != owner:
        raise refusal
    try:
        with in_background(renew_until):
            yield
    finally:
        if _owner(path) == owner:
            path.unlink(missing_ok=True)


def _wait_until_free(path: ObjectPath, refusal: CraftError, wait_s: float) -> None:
    """Wait until the lock is free or has expired; refuse one that was renewed meanwhile once `wait_s` has passed."""
    end = time.monotonic() + wait_s
    last, since, changed = _content(path), time.monotonic(), False
    while last is not None:
        time.sleep(POLL_S)
        now = _content(path)
        if now != last:
            last, since, changed = now, time.monotonic(), True
        if now is None or time.monotonic() - since >= EXPIRE_S:
            return
        if changed and time.monotonic() >= end:
            raise refusal


def _content(path: ObjectPath) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _owner(path: ObjectPath) -> str | None:
    content = _content(path)
    return None if content is None else str(json.loads(content)["owner"])
