"""Where the numbers of a run go beside its folder: MLflow and Weights & Biases, each optional, behind one interface.

Only the driver opens trackers: one process writes MLflow's SQLite file, and credentials stay out of the workers.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self
from urllib.parse import unquote, urlsplit

from craft_ray.config import SQLITE, TrackingConfig
from craft_ray.errors import ConfigError, CraftError, Interrupted, StorageError
from craft_ray.storage.paths import StoragePath

if TYPE_CHECKING:
    from craft_ray.run.metrics import Record
    from craft_ray.run.observers import Observer

Status = Literal["finished", "stopped", "failed"]
STATUS = "craft.status"
ANSWER_S = 5
UPLOAD_S = 60
CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")

# Limits of MLflow's server and database.
PARAM_CHARS = 6000
PARAMS_PER_REQUEST = 100
METRICS_PER_REQUEST = 1000


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


def open_trackers(config: TrackingConfig, folder: StoragePath) -> list[Tracker]:
    """The trackers that `config` asks for; none where all is off.

    Args:
        folder: where Weights & Biases keeps its files.

    Raises:
        ConfigError: a package is missing, a server does not answer or does not let us in.
    """
    trackers: list[Tracker] = []
    if config.mlflow is not None:
        trackers.append(MlflowTracker(config.mlflow, config.project))
    if config.wandb != "off":
        if not isinstance(folder, Path):
            raise ConfigError(
                f"tracking.wandb keeps files in the run folder while it runs, and {folder} is in an object store: "
                f"choose an output folder on a disk or a mount, or track with MLflow"
            )
        trackers.append(WandbTracker(config.wandb, config.project, folder))
    return trackers


class TrackingObserver:
    """Logs what it is told to tracked runs, and passes everything on to another observer. Ends the runs on leaving.

    A tracker that stops working costs its own numbers, not the training: it is told once and dropped.
    """

    def __init__(self, inner: Observer, runs: Sequence[TrackedRun]) -> None:
        self.inner = inner
        self._runs = list(runs)
        self._step = 0

    def note(self, text: str) -> None:
        self.inner.note(text)

    def steps(self, records: Sequence[Record]) -> None:
        self.inner.steps(records)
        self._log(records)

    def validated(self, record: Record) -> None:
        self.inner.validated(record)
        self._log([record])

    def done(self, result: dict[str, Any]) -> None:
        """The numbers of the result are logged at its last step as `result/...`."""
        self.inner.done(result)
        numbers = {
            "result/" + key.replace(".", "/"): value
            for key, value in flatten(result).items()
            if isinstance(value, int | float)
        }
        self._log([{"step": result["steps"], **numbers}])

    def _log(self, records: Sequence[Record]) -> None:
        for run in list(self._runs):
            with self._surviving(run):
                run.log(records)

    @contextmanager
    def _surviving(self, run: TrackedRun) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            self._runs.remove(run)
            self.inner.note(f"{error.message}; the run goes on without it, the run folder has all numbers")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status: Status = "finished"
        if kind is not None:
            status = "stopped" if issubclass(kind, KeyboardInterrupt | Interrupted) else "failed"
        for run in list(self._runs):
            with self._surviving(run):
                run.end(status)


# -- MLflow


class MlflowTracker:
    """Runs in the experiment `project` of an MLflow server or SQLite file."""

    name = "mlflow"

    def __init__(self, uri: str, project: str) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        # MLflow's own seven tries of two minutes each would hold a run up that long, at every request.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self.shown = without_credentials(uri)
        artifacts = None
        if uri.startswith(SQLITE):
            _require("mlflow", "mlflow", "sqlalchemy", "alembic")
            file = Path(uri.removeprefix(SQLITE)).absolute()
            _check_sqlite(file)
            uri, artifacts = f"{SQLITE}{file}", (file.parent / f"{file.stem}-artifacts").as_uri()
        elif uri.startswith(("http://", "https://")):
            _require("mlflow", "mlflow")
            _check_answers(uri)
        else:
            raise ConfigError(
                f"tracking.mlflow={self.shown} is no address that runs can be tracked at: write sqlite:///mlflow.db or "
                f"http://server:5000"
            )
        for chatty in ("mlflow", "alembic"):  # what they would print with a traceback is raised as well
            logging.getLogger(chatty).setLevel(logging.CRITICAL)

        from mlflow import MlflowClient

        self._uri = uri
        with self.asking(ConfigError, "does not open"):
            # Without the second address MLflow would look for models in a new mlflow.db of the working directory.
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._experiment = self._find_experiment(project, artifacts)

    def _find_experiment(self, project: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(project)
        if found is None:
            try:
                return str(self.client.create_experiment(project, artifact_location=artifacts))
            except MlflowException:
                found = self.client.get_experiment_by_name(project)  # somebody else was quicker
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

        with self.asking(ConfigError if id else StorageError, f"has no run {id}" if id else "takes no new run"):
            if id is None:
                tags = {} if parent is None else {"mlflow.parentRunId": parent.id}
                run = self.client.create_run(self._experiment, run_name=name, tags=tags)
            else:
                run = self.client.get_run(id)
                self.client.update_run(id, status="RUNNING")
        tracked = MlflowRun(self, run.info.run_id)
        known = run.data.params
        texts = [Param(key, _param(value)) for key, value in flatten(params).items() if key not in known]
        with self.asking(StorageError, "takes no parameters"):
            for part in _parts(texts, PARAMS_PER_REQUEST):
                self.client.log_batch(tracked.id, params=part)
            self.client.log_batch(tracked.id, tags=[RunTag(STATUS, "running")])
        return tracked

    @contextmanager
    def asking(self, kind: type[CraftError], refused: str) -> Iterator[None]:
        """Errors of MLflow as one line without passwords."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            raise kind(f"MLflow at {self.shown} {refused} ({_told(error, self._uri)})") from None


class MlflowRun:
    """A run by its id; MLflow's run of the process is left alone, so that several can be open."""

    def __init__(self, tracker: MlflowTracker, id: str) -> None:
        self.id = id
        self._tracker = tracker

    def reached(self) -> int:
        client = self._tracker.client
        with self._tracker.asking(StorageError, "does not tell what it holds"):
            keys = client.get_run(self.id).data.metrics
            return max((entry.step for key in keys for entry in client.get_metric_history(self.id, key)), default=0)

    def log(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [
            Metric(key, value, now, record["step"]) for record in records for key, value in _numbers(record).items()
        ]
        with self._tracker.asking(StorageError, "takes no numbers"):
            for part in _parts(metrics, METRICS_PER_REQUEST):
                self._tracker.client.log_batch(self.id, metrics=part)

    def end(self, status: Status) -> None:
        ended = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[status]
        with self._tracker.asking(StorageError, "takes no end of a run"):
            self._tracker.client.set_tag(self.id, STATUS, status)
            self._tracker.client.set_terminated(self.id, ended)


def _check_sqlite(file: Path) -> None:
    """MLflow itself would try for a minute and leave a traceback."""
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
        raise ConfigError(f"tracking.mlflow: {file} is no SQLite database: choose another file")


def _check_answers(uri: str) -> None:
    """Any answer is one: what the server says to us is seen at the first question."""
    import requests

    try:
        requests.get(uri, timeout=ANSWER_S, allow_redirects=False)
    except (requests.RequestException, ValueError) as error:
        raise ConfigError(
            f"no tracking server answers at {without_credentials(uri)} ({type(error).__name__}): start it, or mend or "
            f"remove tracking.mlflow"
        ) from None


def _param(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= PARAM_CHARS else text[: PARAM_CHARS - 3] + "..."


# -- Weights & Biases


class WandbTracker:
    """Runs in a project of Weights & Biases. The children of a run are the group that is named after its id.

    Offline runs lie in `folder/wandb`, for `wandb sync`. An offline run that goes on has one folder for each process.
    """

    name = "wandb"

    def __init__(self, mode: Literal["offline", "online"], project: str, folder: Path) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        _require("wandb", "wandb")
        import wandb

        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be made ({error.strerror}): choose another folder") from None
        if not os.access(folder, os.W_OK):  # wandb would go to the folder for temporary files
            raise ConfigError(f"{folder} cannot be written: choose another folder")
        self._mode = mode
        self._project = project
        self._folder = folder
        self._settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            finish_timeout=UPLOAD_S,
            finish_timeout_raises=True,
        )
        wandb.setup(wandb.Settings(silent=True))
        if mode == "online":
            self._log_in()

    def _log_in(self) -> None:
        import wandb

        try:
            known = wandb.login(verify=True, prompt=False)
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases does not let us in ({_told(error)}): mend WANDB_API_KEY or the network, or set "
                f"tracking.wandb=offline"
            ) from None
        if not known:
            raise ConfigError(
                "tracking.wandb=online needs a key: set WANDB_API_KEY, run 'wandb login', or set tracking.wandb=offline"
            )

    def start(
        self, name: str, params: Mapping[str, Any], parent: TrackedRun | None = None, id: str | None = None
    ) -> WandbRun:
        import wandb

        try:
            run = wandb.init(
                project=self._project,
                dir=self._folder,
                # A readable id: it names the folder of an offline run, and the group of a run's children.
                id=id or f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)[:100]}-{secrets.token_hex(4)}",
                name=name,
                group=None if parent is None else parent.id,
                config=flatten(params),
                allow_val_change=True,
                mode=self._mode,
                reinit="create_new",
                resume="allow" if self._mode == "online" else None,  # offline there is nobody to ask
                settings=self._settings,
            )
        except (wandb.Error, OSError) as error:
            raise StorageError(f"Weights & Biases takes no run {name} ({_told(error)})") from None
        # The step of the record is the axis. W&B's own one drops what is logged after a later step.
        run.define_metric("*", step_metric="step")
        return WandbRun(run)


class WandbRun:
    def __init__(self, run: Any) -> None:
        self.id = str(run.id)
        self._run = run

    def reached(self) -> int:
        return 0

    def log(self, records: Sequence[Record]) -> None:
        import wandb

        try:
            for record in records:
                if numbers := _numbers(record):
                    self._run.log({"step": record["step"], **numbers})
        except (wandb.Error, OSError) as error:
            raise StorageError(f"Weights & Biases takes no numbers ({_told(error)})") from None

    def end(self, status: Status) -> None:
        import wandb

        try:
            self._run.summary[STATUS] = status
            self._run.finish(exit_code=1 if status == "failed" else 0)
        except (wandb.Error, OSError) as error:
            raise StorageError(
                f"the run {self.id} was not handed to Weights & Biases in full ({_told(error)}): send it with "
                f"wandb sync {Path(self._run.dir).parent}"
            ) from None


# -- both


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested sections by dotted keys, without passwords of addresses."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = _clean(value)
    return leaves


def _clean(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def without_credentials(text: str) -> str:
    """The text with `user:password@` in addresses struck out."""
    return CREDENTIALS.sub("***@", text)


def _numbers(record: Record) -> dict[str, float]:
    return {key: float(value) for key, value in record.items() if key != "step" and value is not None}


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _told(error: BaseException, uri: str = "") -> str:
    """The beginning of an error's text; libraries append requests and tracebacks."""
    text = " ".join(str(error).partition("[SQL")[0].split()) or type(error).__name__
    text = without_credentials(text)
    password = urlsplit(uri).password
    if password:
        text = text.replace(password, "***").replace(unquote(password), "***")
    return text if len(text) <= 200 else text[:197] + "..."


def _require(extra: str, *modules: str) -> None:
    for name in modules:
        try:
            module = importlib.import_module(name)
            if module.__file__ is None:  # a folder of runs, e.g. ./wandb, passes for a package
                raise ImportError(f"{next(iter(module.__path__))} is no package")
        except ImportError as error:
            raise ConfigError(
                f"tracking.{extra} is set, but {name} does not import ({error}): pip install 'craft-ray[{extra}]'"
            ) from None
