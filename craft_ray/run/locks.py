"""Who may train a run: one command at a time, and of its processes one.

The command holds its lock from start to end, so that a second start of the same run is refused at once and touches
nothing. The process that trains holds a second one: it outlives a command that was killed, and is then waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from craft_ray.errors import ConfigError, CraftError
from craft_ray.run.folder import RunFolder
from craft_ray.storage.lock import exclusive_lock
from craft_ray.storage.paths import remove_tree
from craft_ray.workers import Workers

COMMAND_LOCK, PROCESS_LOCK = ".claim", ".lock"
LOCK_WAIT_S = 120
"""An NFS server keeps the lock of a machine that vanished for 90 s."""
REMOVAL_WAIT_S = 5


@contextmanager
def only_command(folder: RunFolder) -> Iterator[None]:
    """Let only one command train a run.

    Raises:
        ConfigError: another command is training it.
    """
    with exclusive_lock(folder.path / COMMAND_LOCK, _refusal(folder)):
        yield


@contextmanager
def only_process(folder: RunFolder, workers: Workers) -> Iterator[None]:
    """Let only one process write a run folder. A worker whose driver was killed ends a little later; wait for it.

    Raises:
        ConfigError: another process is training this run.
    """
    if workers.rank != 0:
        workers.gather(None)  # no worker reads the last checkpoint before the folder is locked
        yield
        return
    with exclusive_lock(folder.home / PROCESS_LOCK, _refusal(folder), wait_s=LOCK_WAIT_S):
        workers.gather(None)
        yield


def remove_unstarted(folder: RunFolder) -> None:
    """Remove the folder of a run that took no step, unless a process is still at it. The caller holds its command
    lock."""
    with suppress(CraftError), exclusive_lock(folder.path / PROCESS_LOCK, _refusal(folder), wait_s=REMOVAL_WAIT_S):
        if not folder.started:
            remove_tree(folder.path)


def _refusal(folder: RunFolder) -> ConfigError:
    return ConfigError(f"another process is training the run {folder.home}: wait until it is done, or stop it")
