"""A run whose folder is kept in an object store: a process works on a mirror on its node and pushes it back.

An object cannot grow, so files that do (metrics, progress, TensorBoard's events) are pushed whole every few seconds. A
checkpoint is pushed when it is complete, and after it the object `last`, which names it; `result.json` is pushed after
everything else. So a reader, or a process that resumes the run, never sees half of either.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from craft_ray.background import in_background
from craft_ray.errors import StorageError
from craft_ray.run.checkpoint import checkpoint_step
from craft_ray.run.folder import RunFolder
from craft_ray.run.locks import COMMAND_LOCK, PROCESS_LOCK
from craft_ray.storage.files import is_temporary
from craft_ray.storage.last import last_checkpoint, point_last
from craft_ray.storage.paths import ObjectPath, copy_tree, remove_tree
from craft_ray.workers import Workers

PUSH_S = 2.0
"""Shortest time between two pushes of files that grow."""
SHARE = 0.05
"""Largest share of the time that is spent on pushing."""
NOT_PULLED = ("checkpoints", "tensorboard", COMMAND_LOCK, PROCESS_LOCK)
"""Entries of a run's folder that are not pulled whole: of the checkpoints only the last one is."""


@contextmanager
def mirrored_folder(folder: RunFolder, main: bool = True) -> Iterator[RunFolder]:
    """The folder to train in: the run's own, or, for a run in an object store, a mirror on this node, which is empty
    until `pull`.

    Args:
        main: whether this process is the one that pushes it back.
    """
    if not isinstance(folder.path, ObjectPath):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="craft-ray-run-") as scratch:
        mirror = RunMirror(folder.path, Path(scratch) / folder.path.name, folder)
        if not main:
            yield mirror
            return
        with mirror.pushed_regularly():
            yield mirror


class RunMirror(RunFolder):
    """A run's folder on this node's disk."""

    def __init__(self, home: ObjectPath, path: Path, origin: RunFolder) -> None:
        path.mkdir()
        super().__init__(path, shared=origin.shared)
        self.home: ObjectPath = home
        self._local = path
        self._pushed: dict[Path, tuple[int, int]] = {}
        self._pushing = threading.Lock()

    def pull(self) -> None:
        with self._pushing:  # a push meanwhile would replace what is whole with what is half fetched
            for entry in self.home.iterdir():
                if entry.name not in NOT_PULLED:
                    copy_tree(entry, self._local / entry.name)
            self._pushed = {file: _state(file) for file in self._files()}
        last = last_checkpoint(self.home / "checkpoints")
        if last is not None:
            (self._local / "checkpoints").mkdir()
            copy_tree(last, self._local / "checkpoints" / last.name)
            point_last(self._local / "checkpoints", last.name)

    def checkpoint(self, name: str) -> Path:
        local = super().checkpoint(name)
        if not local.exists():
            copy_tree(self.home / "checkpoints" / name, local)
        return local

    def write_result(self, result: dict[str, Any]) -> None:
        self.push()
        super().write_result(result)
        self._remote(self._local / self.result.name).upload(self._local / self.result.name)

    def push(self) -> None:
        with self._pushing:
            for file in self._files():
                state = _state(file)
                if self._pushed.get(file) != state:
                    self._remote(file).upload(file)
                    self._pushed[file] = state

    def push_checkpoint(self) -> None:
        local, home = self._local / "checkpoints", self.home / "checkpoints"
        last = last_checkpoint(local)
        assert last is not None, "a checkpoint was just written"
        self.push()  # a run that resumes from here has the metrics up to here
        remove_tree(home / last.name)  # the part of it that a lost process had pushed
        copy_tree(last, home / last.name)
        self._point_last(last.name)

    def push_pointer(self, name: str) -> None:
        point_last(self.home / "checkpoints", name)

    def push_parts(self, name: str, workers: Workers) -> None:
        home = self.home / "checkpoints" / name
        if workers.rank == 0:
            self.push()
            remove_tree(home)
        workers.gather(None)
        copy_tree(self._local / "checkpoints" / name, home)
        workers.gather(None)
        if workers.rank == 0:
            self._point_last(name)

    def _point_last(self, name: str) -> None:
        """Let other processes resume from a checkpoint that is pushed, and remove those before it that are no longer
        kept."""
        local, home = self._local / "checkpoints", self.home / "checkpoints"
        point_last(home, name)
        kept = {entry.name for entry in local.glob("step_*")}
        for old in [entry for entry in home.glob("step_*") if entry.name not in kept]:
            if checkpoint_step(old) < checkpoint_step(home / name):
                remove_tree(old)

    @contextmanager
    def pushed_regularly(self) -> Iterator[None]:
        """Push what has grown while the body runs, and once more at its end."""

        def push_until(done: threading.Event) -> None:
            spent = 0.0
            while not done.wait(max(PUSH_S, spent / SHARE)):
                started = time.monotonic()
                # The next push may succeed; if none does, the next checkpoint reports it. What was seen may be gone.
                with suppress(StorageError, FileNotFoundError):
                    self.push()
                spent = time.monotonic() - started

        try:
            with in_background(push_until):
                yield
        finally:
            self.push()

    def _files(self) -> list[Path]:
        """The files that are pushed whole; checkpoints and the result are pushed separately."""
        apart = (self._local / "checkpoints", self._local / self.result.name)
        files = [(file, {file, *file.parents}) for file in self._local.rglob("*") if file.is_file()]
        return [file for file, path in files if not path.intersection(apart) and not any(map(is_temporary, path))]

    def _remote(self, file: Path) -> ObjectPath:
        return self.home / file.relative_to(self._local).as_posix()


def _state(file: Path) -> tuple[int, int]:
    """Size and time of a file, which differ once it has changed."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns
