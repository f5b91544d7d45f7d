"""The errors that Ray raises for a lost process, and whether its node was lost with it."""

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


def node_was_lost(error: BaseException) -> bool:
    """Whether a process was lost with its node, which does not count as a failure.

    Ray knows at once of a process that dies on a living node. One that merely stops answering is on a node that Ray is
    about to declare dead.
    """
    return isinstance(error, NodeDiedError | ObjectLostError | ActorUnavailableError) or (
        isinstance(error, RayActorError) and (error.preempted or "its node has died" in str(error))
    )
