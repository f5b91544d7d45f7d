"""Runs in trackio's local store, which its dashboard shows (`trackio show`)."""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from craft_ray.errors import ConfigError, CraftError, StorageError
from craft_ray.extras import install, missing
from craft_ray.tracking.content import flatten, numbers, reason
from craft_ray.tracking.tracker import STATUS, Status, TrackedRun

if TYPE_CHECKING:
    from craft_ray.run.metrics import Record


class TrackioTracker:
    """Runs in a project of trackio, in the SQLite file of that project: in `$TRACKIO_DIR`, or in `trackio` in the hub's
    own folder. The children of a run form the group that is named after its id.

    trackio's own `init` finishes the previous run, and its `log` writes in a thread that only warns of a full disk. So
    records are written into its store, one transaction each time.
    """

    name = "trackio"

    def __init__(self, project: str) -> None:
        if lacking := missing("trackio"):
            raise ConfigError(f"tracking.trackio is set, but {lacking}: {install('trackio')}")
        from trackio.sqlite_storage import SQLiteStorage

        self.store = SQLiteStorage
        self.project = project
        try:
            self.store.validate_project_name(project)
        except ValueError as error:
            raise ConfigError(f"tracking.project is {project}, which trackio refuses ({reason(error)})") from None
        with self.errors_as(ConfigError, "does not open; TRACKIO_DIR names another folder"):
            self.file = self.store.init_db(project)

    def start(
        self, name: str, params: Mapping[str, Any], parent: TrackedRun | None = None, id: str | None = None
    ) -> TrackioRun:
        known: dict[str, Any] = {"_Username": None, "_Created": datetime.now(UTC).isoformat()}
        known["_Group"] = None if parent is None else parent.id
        if id is not None:
            with self.errors_as(ConfigError, f"does not show the run {id}"):
                found = self.store.get_run_config(self.project, run_id=id)
            if found is None:
                raise ConfigError(f"trackio has no run {id} in the project {self.project} ({self.file})")
            known = found
        run = TrackioRun(self, id or _readable_id(name), name, {**flatten(params), **known})
        run.write([], "running")
        return run

    @contextmanager
    def errors_as(self, kind: type[CraftError], refused: str) -> Iterator[None]:
        """Raise errors of the store as one line."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise kind(f"trackio's store of {self.project} {refused} ({reason(error)})") from None


class TrackioRun:
    """A run by its id; trackio's current run of the process is not used, so that several can be open."""

    def __init__(self, tracker: TrackioTracker, id: str, name: str, config: dict[str, Any]) -> None:
        self.id = id
        self._tracker = tracker
        self._name = name
        self._config = config
        self._last = self.reached()

    def reached(self) -> int:
        with self._tracker.errors_as(StorageError, "does not return its metrics"):
            return self._tracker.store.get_max_step_for_run(self._tracker.project, run_id=self.id) or 0

    def log(self, records: Sequence[Record]) -> None:
        if measured := [record for record in records if numbers(record)]:
            self.write(measured, None)

    def end(self, status: Status) -> None:
        self.write([], status)

    def write(self, records: Sequence[Record], status: str | None) -> None:
        """Write records and, if it changes, the status. The store takes a config only with a record, so an empty
        one at the last step carries it."""
        self._last = max([self._last, *(record["step"] for record in records)])
        steps = [record["step"] for record in records] or [self._last]
        config = None if status is None else {**self._config, STATUS: status}
        with self._tracker.errors_as(StorageError, "does not accept metrics"):
            self._tracker.store.bulk_log(
                self._tracker.project,
                self._name,
                [numbers(record) for record in records] or [{}],
                steps=steps,
                config=config,
                run_id=self.id,
            )


def _readable_id(name: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)[:100]}-{secrets.token_hex(4)}"
