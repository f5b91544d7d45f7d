"""What Ray raises where a process is gone, and whether it went with its node."""

from __future__ import annotations

from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)

LOST_PROCESS_ERRORS = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError)


def with_its_node(error: BaseException) -> bool:
    """Whether a process was lost with its node, which is nobody's failure.

    Ray is told at once of a process that dies on a living node. One that merely does not answer any more is on a node
    that is about to be given up.
    """
    return isinstance(error, NodeDiedError | ObjectLostError | ActorUnavailableError) or (
        isinstance(error, RayActorError) and (error.preempted or "its node has died" in str(error))
    )
