"""The interface of a tracker, which stores the metrics of a run in addition to its folder.

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
    """One run of a tracker, which receives metrics until it is ended."""

    id: str
    """A later process continues the same run by this id."""

    def reached(self) -> int:
        """The last step that the tracker has; 0 if it has none or cannot be asked (W&B offline).

        Raises:
            StorageError: the tracker does not answer.
        """

    def log(self, records: Sequence[Record]) -> None:
        """Log the metrics of some steps, each a record with its `step`. Values that are None are skipped.

        Raises:
            StorageError: the tracker does not accept them.
        """

    def end(self, status: Status) -> None:
        """End the run: `stopped` if a scheduler or a person ended it early, `failed` if an error did.

        Raises:
            StorageError: the tracker does not accept it.
        """


class Tracker(Protocol):
    """A service or file that runs are tracked in. Several runs can be open at once."""

    name: str

    def start(
        self, name: str, params: Mapping[str, Any], parent: TrackedRun | None = None, id: str | None = None
    ) -> TrackedRun:
        """Start a new run, below `parent` if one is given; or continue the run `id`.

        A continued run of MLflow or trackio keeps its parameters; further ones are added. Steps that a lost
        process logged after its last checkpoint appear twice.

        Args:
            params: sections become dotted keys; passwords in addresses are removed.

        Raises:
            ConfigError: MLflow or trackio has no run `id`. (Weights & Biases starts one with that id.)
            StorageError: the tracker does not accept it.
        """
