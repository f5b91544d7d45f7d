"""Whether the nodes of a cluster share the storage that a stage is to use.

Where they do not, every node writes to a disk of its own, and what comes out is missing without a word.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from craft_pipelines.nodes import Node, alive_nodes, ask
from craft_ray.errors import ConfigError, StorageError
from craft_ray.storage.paths import StoragePath, remove_tree, storage_path

PATIENCE_S = 3.0
"""How long a file may need to be seen elsewhere."""

POLL_S = 0.1
NAMED = 3


def check_shared(path: StoragePath, key: str) -> None:
    """Refuse to go on where a node does not see what this process writes below `path`, or the other way round.

    Args:
        key: of the config, or an option, that names the path.

    Raises:
        ConfigError: a node does not; a cluster of one node always does.
        StorageError: this process itself cannot write there.
    """
    nodes = alive_nodes()
    if len(nodes) < 2:
        return
    found = blind(path, nodes)
    if found:
        told = ", ".join(f"{node.name}: {why}" for node, why in list(found.items())[:NAMED])
        raise ConfigError(
            f"{key} is {path}, and {len(found)} of {len(nodes)} nodes do not see what this one writes there ({told}): "
            f"mount the same storage at this path on every node, or name s3://BUCKET/FOLDER"
        )


def blind(path: StoragePath, nodes: Sequence[Node]) -> dict[Node, str]:
    """The nodes that do not share `path` with this process, and why: each reads a file of this process's and writes one
    that this process reads.

    Raises:
        StorageError: this process cannot write there.
    """
    probe, content = path / f".craft-ray-check-{secrets.token_hex(8)}", secrets.token_hex(16)
    found = {}
    try:
        probe.mkdir()  # without its parents: a typing error makes no folder
        try:
            _write(probe / "asked", content)
            for node, answer in ask(_answer, nodes, str(probe), content).items():
                why = answer.error or answer.value or _missing(probe / _own(node.id), content)
                if why:
                    found[node] = why
        finally:
            remove_tree(probe)
    except OSError as error:
        raise StorageError(f"{path} cannot be written to ({error}): make it, free space or choose another") from error
    return found


def _answer(probe: str, content: str) -> str | None:
    """On a node: read the question, and only where it is there, write the answer. Returns what went wrong."""
    import ray

    place = storage_path(probe)
    why = _missing(place / "asked", content)
    if why:
        return why
    try:
        _write(place / _own(ray.get_runtime_context().get_node_id()), content)
    except (OSError, StorageError) as error:
        return f"it cannot write there, {error}"
    return None


def _missing(path: StoragePath, content: str) -> str | None:
    """Why `content` is not in the file, once it has had time to get there."""
    end = time.monotonic() + PATIENCE_S
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
