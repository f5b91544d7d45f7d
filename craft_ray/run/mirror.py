"""A run whose folder is kept in an object store: a process works on a copy on its node and brings it back.

What grows (metrics, progress, TensorBoard's events) cannot grow in a store, so it is sent anew as it stands, every few
seconds. A checkpoint is sent when it is complete, and after it the object `last`, which names it; `result.json` is sent
after everything else. So a reader, or a process that goes on with the run, never meets half of either.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from craft_ray.errors import StorageError
from craft_ray.run.checkpoint import checkpoint_step
from craft_ray.run.folder import RunFolder
from craft_ray.storage.files import is_temporary
from craft_ray.storage.last import last_checkpoint, point_last
from craft_ray.storage.paths import ObjectPath, copy_tree, remove_tree

SEND_S = 2.0
"""Shortest time between two sendings of what grows."""
SHARE = 0.05
"""Largest share of the time that is spent on sending."""
NOT_AT_HAND = ("checkpoints", "tensorboard", ".lock")
"""What of a run's folder is not fetched as it stands: of the checkpoints only the last is."""


@contextmanager
def mirrored_folder(folder: RunFolder, main: bool = True) -> Iterator[RunFolder]:
    """The folder to train in: a run's own, or for one in an object store a copy on this node, which is empty until
    `fetch`.

    Args:
        main: whether this process is the one that brings it back.
    """
    if not isinstance(folder.path, ObjectPath):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="craft-ray-run-") as scratch:
        copy = RunMirror(folder.path, Path(scratch) / folder.path.name, folder)
        if not main:
            yield copy
            return
        with copy.sent_regularly():
            yield copy


class RunMirror(RunFolder):
    """A run's folder on this node's disk."""

    def __init__(self, home: ObjectPath, path: Path, origin: RunFolder) -> None:
        path.mkdir()
        super().__init__(path, shared=origin.shared)
        self.home: ObjectPath = home
        self._local = path
        self._sent: dict[Path, tuple[int, int]] = {}
        self._sending = threading.Lock()

    def pull(self) -> None:
        for entry in self.home.iterdir():
            if entry.name not in NOT_AT_HAND:
                copy_tree(entry, self._local / entry.name)
        self._sent = {file: _state(file) for file in self._files()}
        last = last_checkpoint(self.home / "checkpoints")
        if last is not None:
            (self._local / "checkpoints").mkdir()
            copy_tree(last, self._local / "checkpoints" / last.name)
            point_last(self._local / "checkpoints", last.name)

    def write_result(self, result: dict[str, Any]) -> None:
        self.push()
        super().write_result(result)
        self._place(self._local / self.result.name).upload(self._local / self.result.name)

    def push(self) -> None:
        with self._sending:
            for file in self._files():
                state = _state(file)
                if self._sent.get(file) != state:
                    self._place(file).upload(file)
                    self._sent[file] = state

    def push_checkpoint(self) -> None:
        local, home = self._local / "checkpoints", self.home / "checkpoints"
        last = last_checkpoint(local)
        assert last is not None, "a checkpoint was just written"
        self.push()  # a run that goes on from here has the numbers up to here
        remove_tree(home / last.name)  # what a lost process had sent of it
        copy_tree(last, home / last.name)
        point_last(home, last.name)
        kept = {entry.name for entry in local.glob("step_*")}
        for old in [entry for entry in home.glob("step_*") if entry.name not in kept]:
            if checkpoint_step(old) < checkpoint_step(last):
                remove_tree(old)

    @contextmanager
    def sent_regularly(self) -> Iterator[None]:
        """Send what has grown while the body runs, and once more at its end."""
        done = threading.Event()

        def send() -> None:
            spent = 0.0
            while not done.wait(max(SEND_S, spent / SHARE)):
                started = time.monotonic()
                with suppress(StorageError):  # the next one may arrive; where none does, the next checkpoint says so
                    self.push()
                spent = time.monotonic() - started

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        try:
            yield
        finally:
            done.set()
            sender.join()
            self.push()

    def _files(self) -> list[Path]:
        """What is sent as it stands."""
        apart = (self._local / "checkpoints", self._local / self.result.name)
        found = (file for file in self._local.rglob("*") if file.is_file() and not is_temporary(file))
        return [file for file in found if not {file, *file.parents}.intersection(apart)]

    def _place(self, file: Path) -> ObjectPath:
        return self.home / file.relative_to(self._local).as_posix()


def _state(file: Path) -> tuple[int, int]:
    """By which a file that has changed is known."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns
