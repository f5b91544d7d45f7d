"""What a tracker must offer: a place where the numbers of a run go beside its folder.

Only the driver opens trackers: one process writes MLflow's SQLite file, and credentials stay out of the workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from craft_ray.run.metrics import Record

Status = Literal["finished", "stopped", "failed"]
STATUS = "craft.status"
"""The tag of a tracked run that holds its status."""


class TrackedRun(Protocol):
    """One run of a tracker, to which numbers go until it is ended."""

    id: str
    """With which a later process goes on with the same run."""

    def reached(self) -> int:
        """The last step that the tracker holds; 0 where there is none, or nobody to ask (W&B offline).

        Raises:
            StorageError: the tracker does not answer.
        """

    def log(self, records: Sequence[Record]) -> None:
        """Add the numbers of some steps, each a record with its `step`. None is left out.

        Raises:
            StorageError: the tracker does not take them.
        """

    def end(self, status: Status) -> None:
        """`stopped` is what a scheduler or a person ended early, `failed` what an error ended.

        Raises:
            StorageError: the tracker does not take it.
        """


class Tracker(Protocol):
    """A place where runs are tracked. Several runs can be open at once."""

    name: str

    def start(
        self, name: str, params: Mapping[str, Any], parent: TrackedRun | None = None, id: str | None = None
    ) -> TrackedRun:
        """A new run, below `parent` where one is given; or the run `id`, to go on with.

        A run of MLflow that goes on keeps the parameters that it has; further ones are added. Steps that a lost process
        had logged after its last checkpoint appear twice.

        Args:
            params: sections become dotted keys; passwords in addresses are struck out.

        Raises:
            ConfigError: MLflow has no run `id`. (Weights & Biases begins one with that id.)
            StorageError: the tracker does not take it.
        """
