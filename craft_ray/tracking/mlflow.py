"""Runs in MLflow: on a server, or in a SQLite file."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_ray.config import SQLITE
from craft_ray.errors import ConfigError, CraftError, StorageError
from craft_ray.extras import install, missing
from craft_ray.tracking.content import flatten, numbers, reason, without_credentials
from craft_ray.tracking.tracker import STATUS, Status, TrackedRun

if TYPE_CHECKING:
    from craft_ray.run.metrics import Record

ANSWER_S = 5

# Limits of MLflow's server and database.
PARAM_CHARS = 6000
PARAMS_PER_REQUEST = 100
METRICS_PER_REQUEST = 1000


class MlflowTracker:
    """Runs in the experiment `project` of an MLflow server or SQLite file."""

    name = "mlflow"

    def __init__(self, uri: str, project: str) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        # MLflow's default of seven tries of two minutes each would hold up a run for that long at every request.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self.shown = without_credentials(uri)
        artifacts = None
        if uri.startswith(SQLITE):
            _require("mlflow", "sqlalchemy", "alembic")
            file = Path(uri.removeprefix(SQLITE)).absolute()
            _check_sqlite(file)
            uri, artifacts = f"{SQLITE}{file}", (file.parent / f"{file.stem}-artifacts").as_uri()
        elif uri.startswith(("http://", "https://")):
            _require("mlflow")
            _check_answers(uri)
        else:
            raise ConfigError(
                f"tracking.mlflow={self.shown} is not an address where runs can be tracked: write sqlite:///mlflow.db "
                f"or http://server:5000"
            )
        for chatty in ("mlflow", "alembic"):  # errors that they would print with a traceback are also raised
            logging.getLogger(chatty).setLevel(logging.CRITICAL)

        from mlflow import MlflowClient

        self._uri = uri
        with self.errors_as(ConfigError, "does not open"):
            # Without the second address MLflow would look for models in a new mlflow.db in the working directory.
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._experiment = self._find_experiment(project, artifacts)

    def _find_experiment(self, project: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(project)
        if found is None:
            try:
                return str(self.client.create_experiment(project, artifact_location=artifacts))
            except MlflowException:
                found = self.client.get_experiment_by_name(project)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise ConfigError(
                f"the experiment {project} was deleted from {self.shown}: restore it, or choose another "
                f"tracking.project"
            )
        return str(found.experiment_id)

    def start(
        self, name: str, params: Mapping[str, Any], parent: TrackedRun | None = None, id: str | None = None
    ) -> MlflowRun:
        from mlflow.entities import Param, RunTag

        with self.errors_as(
            ConfigError if id else StorageError, f"has no run {id}" if id else "does not accept a new run"
        ):
            if id is None:
                tags = {} if parent is None else {"mlflow.parentRunId": parent.id}
                run = self.client.create_run(self._experiment, run_name=name, tags=tags)
            else:
                run = self.client.get_run(id)
                self.client.update_run(id, status="RUNNING")
        tracked = MlflowRun(self, run.info.run_id)
        known = run.data.params
        texts = [Param(key, _param(value)) for key, value in flatten(params).items() if key not in known]
        with self.errors_as(StorageError, "does not accept parameters"):
            for part in _parts(texts, PARAMS_PER_REQUEST):
                self.client.log_batch(tracked.id, params=part)
            self.client.log_batch(tracked.id, tags=[RunTag(STATUS, "running")])
        return tracked

    @contextmanager
    def errors_as(self, kind: type[CraftError], refused: str) -> Iterator[None]:
        """Raise errors of MLflow as one line without passwords."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            raise kind(f"MLflow at {self.shown} {refused} ({reason(error, self._uri)})") from None


class MlflowRun:
    """A run by its id; MLflow's active run of the process is not used, so that several can be open."""

    def __init__(self, tracker: MlflowTracker, id: str) -> None:
        self.id = id
        self._tracker = tracker

    def reached(self) -> int:
        client = self._tracker.client
        with self._tracker.errors_as(StorageError, "does not return its metrics"):
            keys = client.get_run(self.id).data.metrics
            return max((entry.step for key in keys for entry in client.get_metric_history(self.id, key)), default=0)

    def log(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [
            Metric(key, value, now, record["step"]) for record in records for key, value in numbers(record).items()
        ]
        with self._tracker.errors_as(StorageError, "does not accept metrics"):
            for part in _parts(metrics, METRICS_PER_REQUEST):
                self._tracker.client.log_batch(self.id, metrics=part)

    def end(self, status: Status) -> None:
        ended = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[status]
        with self._tracker.errors_as(StorageError, "does not accept the end of a run"):
            self._tracker.client.set_tag(self.id, STATUS, status)
            self._tracker.client.set_terminated(self.id, ended)


def _check_sqlite(file: Path) -> None:
    """Check what MLflow itself would retry for a minute and then report with a traceback."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            stream.seek(0)
            head = stream.read(16)
    except OSError as error:
        raise ConfigError(
            f"tracking.mlflow: {file} cannot be written ({error.strerror}): choose another file"
        ) from None
    if head not in (b"", b"SQLite format 3\0"):
        raise ConfigError(f"tracking.mlflow: {file} is not a SQLite database: choose another file")


def _check_answers(uri: str) -> None:
    """Accept any answer: whether the server lets us in shows at the first request."""
    import requests

    try:
        requests.get(uri, timeout=ANSWER_S, allow_redirects=False)
    except (requests.RequestException, ValueError) as error:
        raise ConfigError(
            f"no tracking server answers at {without_credentials(uri)} ({type(error).__name__}): start it, or fix or "
            f"remove tracking.mlflow"
        ) from None


def _param(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= PARAM_CHARS else text[: PARAM_CHARS - 3] + "..."


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _require(*packages: str) -> None:
    if lacking := missing(*packages):
        raise ConfigError(f"tracking.mlflow is set, but {lacking}: {install('mlflow')}")
