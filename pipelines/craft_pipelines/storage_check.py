"""Check that the nodes of a cluster share the storage that a stage is going to use.

If they do not, every node writes to its own disk, and results are missing without an error.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from craft_pipelines.nodes import Node, alive_nodes, ask
from craft_ray.errors import ConfigError, StorageError
from craft_ray.storage.paths import StoragePath, remove_tree, storage_path

TIMEOUT_S = 3.0
"""How long a file may take to become visible on another node."""

POLL_S = 0.1
MAX_LISTED = 3


def check_shared(path: StoragePath, key: str) -> None:
    """Refuse to continue if a node does not see what this process writes below `path`, or the reverse.

    Args:
        key: the config key or the option that names the path.

    Raises:
        ConfigError: a node does not share the path; a single node always does.
        StorageError: this process itself cannot write there.
    """
    nodes = alive_nodes()
    if len(nodes) < 2:
        return
    found = not_sharing(path, nodes)
    if found:
        reasons = ", ".join(f"{node.name}: {why}" for node, why in list(found.items())[:MAX_LISTED])
        raise ConfigError(
            f"{key} is {path}, and {len(found)} of {len(nodes)} nodes do not see what this one writes there "
            f"({reasons}): mount the same storage at this path on every node, or use s3://BUCKET/FOLDER"
        )


def not_sharing(path: StoragePath, nodes: Sequence[Node]) -> dict[Node, str]:
    """The nodes that do not share `path` with this process, and why: each node reads a file of this process, and writes
    one that this process reads.

    Raises:
        StorageError: this process cannot write there.
    """
    probe, content = path / f".craft-ray-check-{secrets.token_hex(8)}", secrets.token_hex(16)
    found = {}
    try:
        probe.mkdir()  # without its parents, so that a typing error creates no folder
        try:
            _write(probe / "asked", content)
            for node, answer in ask(_answer, nodes, str(probe), content).items():
                why = answer.error or answer.value or _missing(probe / _own(node.id), content)
                if why:
                    found[node] = why
        finally:
            remove_tree(probe)
    except OSError as error:
        raise StorageError(f"{path} cannot be written to ({error}): create it, free space or choose another") from error
    return found


def _answer(probe: str, content: str) -> str | None:
    """Runs on a node: read the request, and if it is there, write the answer. Returns what went wrong."""
    import ray

    folder = storage_path(probe)
    why = _missing(folder / "asked", content)
    if why:
        return why
    try:
        _write(folder / _own(ray.get_runtime_context().get_node_id()), content)
    except (OSError, StorageError) as error:
        return f"it cannot write there, {error}"
    return None


def _missing(path: StoragePath, content: str) -> str | None:
    """Why `content` is not in the file after the time that it may take to become visible; None if it is."""
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            if path.read_text() == content:
                return None
            why = "it sees other content"
        except FileNotFoundError:
            why = "it is not there"
        except (OSError, StorageError) as error:
            why = str(error)
        if time.monotonic() > end:
            return why
        time.sleep(POLL_S)


def _own(node: str) -> str:
    return f"answered-{node}"


def _write(path: StoragePath, content: str) -> None:
    path.write_bytes(content.encode())
