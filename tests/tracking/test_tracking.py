"""Metrics reach real trackers: MLflow on a SQLite file, Weights & Biases offline. If both are off, none is imported."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from craft_ray.config import SQLITE, TrackingConfig
from craft_ray.errors import ConfigError, Interrupted, StorageError
from craft_ray.run.metrics import Record
from craft_ray.run.observers import NullObserver
from craft_ray.tracking import STATUS, Status, Tracker, TrackingObserver, flatten, open_trackers, without_credentials

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")

PARAMS = {"craft": {"lambda_lr": 0.1, "layers": (-2, -1), "epsilon_end": None}, "train": {"steps": 3}, "name": "sweep"}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """One database for all tests: creating its tables takes most of the time."""
    folder = tmp_path_factory.mktemp("mlflow") / "new"
    return TrackingConfig(mlflow=f"{SQLITE}{folder / 'runs.db'}", project="test")


def only(config: TrackingConfig, folder: Path) -> Tracker:
    (tracker,) = open_trackers(config, folder)
    return tracker


def client(config: TrackingConfig) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=config.mlflow, registry_uri=config.mlflow)


def history(config: TrackingConfig, run: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client(config).get_metric_history(run, key)]


def elsewhere(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@contextmanager
def server(status: int) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every request with one status; and the requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline()
            if self.raw_requestline and self.parse_request():
                asked.append(self.requestline)
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.send_response(status)
                self.end_headers()
            self.close_connection = True

        def log_message(self, *words: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def unused_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- MLflow -------------------------------------------------------------------------------------------------------


def test_children_are_open_at_once_below_their_parent(database: TrackingConfig, tmp_path: Path) -> None:
    tracker = only(database, tmp_path)
    parent = tracker.start("sweep", PARAMS)
    first = tracker.start("trial-0", {"craft.lambda_lr": 0.2}, parent)
    second = tracker.start("trial-1", {"craft.lambda_lr": 0.3}, parent)
    for step in (1, 2):
        first.log([{"step": step, "train/loss": 1.0 / step, "craft/conflict": True, "craft/lambda": None}])
        second.log([{"step": step, "train/loss": 2.0 / step}])
    parent.log([{"step": 2, "best": 0.5}])
    first.end("stopped")
    second.end("failed")
    parent.end("finished")

    mlflow = client(database)
    found = {run.id: mlflow.get_run(run.id) for run in (parent, first, second)}
    assert [run.info.run_name for run in found.values()] == ["sweep", "trial-0", "trial-1"]
    assert [run.info.status for run in found.values()] == ["FINISHED", "KILLED", "FAILED"]
    assert [run.data.tags[STATUS] for run in found.values()] == ["finished", "stopped", "failed"]
    assert "mlflow.parentRunId" not in found[parent.id].data.tags
    assert {found[run.id].data.tags["mlflow.parentRunId"] for run in (first, second)} == {parent.id}
    assert found[parent.id].data.params == {
        "craft.lambda_lr": "0.1", "craft.layers": "[-2, -1]", "craft.epsilon_end": "null", "train.steps": "3",
        "name": "sweep",
    }  # fmt: skip
    assert history(database, first.id, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert history(database, second.id, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert found[first.id].data.metrics == {"train/loss": 0.5, "craft/conflict": 1.0}
    children = mlflow.search_runs([found[parent.id].info.experiment_id], f"tags.mlflow.parentRunId = '{parent.id}'")
    assert {run.info.run_id for run in children} == {first.id, second.id}


BEGIN = """
from pathlib import Path
from craft_ray.config import TrackingConfig
from craft_ray.tracking import open_trackers
(tracker,) = open_trackers(TrackingConfig(mlflow="sqlite:///kept/my runs.db"), Path("."))
run = tracker.start("started", {"seed": 0})
run.log([{"step": 1, "x": 1.0}])
run.end("stopped")
tracker.client.log_text(run.id, "text", "note.txt")
print(run.id)
"""


def test_another_process_continues_a_run_and_all_files_are_beside_the_database(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    started = done.stdout.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]  # no mlruns, no second database
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"my runs.db", "my runs-artifacts"}
    assert len(list((tmp_path / "kept" / "my runs-artifacts").glob("*/artifacts/note.txt"))) == 1

    config = TrackingConfig(mlflow=f"{SQLITE}{tmp_path}/kept/my runs.db")
    run = only(config, tmp_path).start("started", {"seed": 1, "further": "x"}, id=started)
    assert run.id == started
    resumed = client(config).get_run(started)
    assert (resumed.info.status, resumed.data.tags[STATUS]) == ("RUNNING", "running")
    run.log([{"step": 2, "x": 2.0}])
    run.end("finished")
    assert client(config).get_run(started).info.status == "FINISHED"
    assert client(config).get_run(started).data.params == {"seed": "0", "further": "x"}
    assert history(config, started, "x") == [(1, 1.0), (2, 2.0)]
    with pytest.raises(ConfigError, match="has no run 0123"):
        only(config, tmp_path).start("started", {}, id="0123")


def test_many_and_long_parameters_and_odd_numbers_fit(database: TrackingConfig, tmp_path: Path) -> None:
    run = only(database, tmp_path).start("long", {**{f"key{i}": i for i in range(250)}, "long": "x" * 7000, "none": ""})
    run.log([{"step": i, "a": i, "b": math.inf, "c": math.nan} for i in range(500)])
    found = client(database).get_run(run.id).data
    assert len(found.params) == 252
    assert len(found.params["long"]) == 6000
    assert found.params["long"].endswith("x...")
    assert len(history(database, run.id, "a")) == 500
    run.log([])
    run.log([{"step": 500, "a": None}])
    assert len(history(database, run.id, "a")) == 500


def test_a_database_without_its_tables_is_reported_once(
    tmp_path: Path, database: TrackingConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    assert database.mlflow is not None
    mine = tmp_path / "mine.db"
    open_trackers(database, tmp_path)
    shutil.copy(database.mlflow.removeprefix(SQLITE), mine)
    run = only(database.model_copy(update={"mlflow": f"{SQLITE}{mine}"}), tmp_path).start("run", {})
    with closing(sqlite3.connect(mine)) as connection:
        connection.execute("drop table runs")
    inner = RecordingObserver()
    with TrackingObserver(inner, [run]) as observer:
        observer.steps([{"step": 1, "x": 1.0}])
        observer.steps([{"step": 2, "x": 1.0}])
    assert inner.notes == [
        f"MLflow at {SQLITE}{mine} does not accept metrics ((sqlite3.OperationalError) no such table: runs); the run "
        f"continues without it, the run folder has all metrics"
    ]
    assert capfd.readouterr() == ("", "")


def unchecked(uri: str) -> TrackingConfig:
    """A config with a password, which its validator would refuse."""
    return TrackingConfig.model_construct(mlflow=uri, wandb="off", trackio="off", project="craft-ray")


def test_a_password_is_refused_in_a_config_that_is_saved() -> None:
    with pytest.raises(ValidationError, match="set MLFLOW_TRACKING_USERNAME"):
        TrackingConfig(mlflow="http://me:s3cret@host")


def test_a_file_that_cannot_be_a_database_is_reported(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("this is no database, but quite long")
    for uri, said in [
        (f"{SQLITE}{text}", f"{text} is not a SQLite database"),
        (f"{SQLITE}{text}/runs.db", "cannot be written"),
        (f"{SQLITE}{tmp_path}", "Is a directory"),
        ("mlruns", "tracking.mlflow=mlruns is not an address"),
        ("mysql://me:s3cret@host/db", "mysql://***@host/db is not an address"),
    ]:
        with pytest.raises(ConfigError) as caught:
            open_trackers(unchecked(uri), tmp_path)
        assert said in caught.value.message
        assert "s3cret" not in caught.value.message


def test_an_experiment_that_was_deleted_is_reported(database: TrackingConfig, tmp_path: Path) -> None:
    config = database.model_copy(update={"project": "deleted"})
    open_trackers(config, tmp_path)
    client(config).delete_experiment(client(config).get_experiment_by_name("deleted").experiment_id)
    with pytest.raises(ConfigError, match="the experiment deleted was deleted from"):
        open_trackers(config, tmp_path)


def test_a_server_that_does_not_answer_is_reported_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_trackers(unchecked(f"http://me:s3%40cret@127.0.0.1:{unused_port()}"), tmp_path)
    assert "no tracking server answers at http://***@127.0.0.1:" in caught.value.message
    with server(401) as (address, asked), pytest.raises(ConfigError) as refused:
        open_trackers(unchecked(f"http://me:s3%40cret@{address}"), tmp_path)
    assert f"MLflow at http://***@{address} does not open" in refused.value.message
    assert "401" in refused.value.message
    assert asked
    for error in (caught.value, refused.value):
        assert "\n" not in error.message
        assert not any(secret in error.message for secret in ("me:", "s3%40cret", "s3@cret"))


# --- Weights & Biases ---------------------------------------------------------------------------------------------

OFFLINE = """
import sys
from pathlib import Path
from craft_ray.config import TrackingConfig
from craft_ray.tracking import open_trackers
folder = Path(sys.argv[1])
(tracker,) = open_trackers(TrackingConfig(wandb="offline", project="test"), folder)
parent = tracker.start("sweep", {"tracking": {"mlflow": "http://me:s3cret@host"}, "craft": {"lambda_lr": 0.25}})
first, second = tracker.start("trial 0", {}, parent), tracker.start("trial 1", {}, parent)
for step in (1, 2):
    first.log([{"step": step, "train/loss": 0.5, "craft/lambda": None}])
    second.log([{"step": step, "train/loss": 0.5, "craft/conflict": step == 2}])
first.end("stopped"); second.end("failed"); parent.end("finished")
(tracker,) = open_trackers(TrackingConfig(wandb="offline", project="test"), folder)
again = tracker.start("trial 0", {}, parent, id=first.id)
again.log([{"step": 3, "train/loss": 0.25}])
again.end("finished")
assert again.id == first.id
(folder / "ids").write_text(" ".join([parent.id, first.id, second.id]))
"""


def offline_run(path: Path) -> list[Any]:
    """The records of a short offline run: a header, then checksum, length, kind and content of each."""
    stored = importlib.import_module("wandb.proto.wandb_internal_pb2").Record  # made at run time
    data, records = path.read_bytes(), []
    assert data.startswith(b":W&B")
    assert len(data) < 32768, "longer files are divided into blocks"
    place = 7
    while place < len(data):
        length, whole = struct.unpack_from("<4xHB", data, place)
        assert whole == 1
        records.append(stored.FromString(data[place + 7 : place + 7 + length]))
        place += 7 + length
    return records


def test_offline_runs_are_in_the_folder_and_nothing_is_sent(tmp_path: Path) -> None:
    folder, home = tmp_path / "runs", tmp_path / "home"
    home.mkdir()
    with server(200) as (address, asked):
        done = elsewhere(
            OFFLINE, str(folder), HOME=str(home), WANDB_BASE_URL=f"http://{address}", HTTPS_PROXY=f"http://{address}",
            SECRET_TOKEN="in-the-environment",
        )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert asked == []
    parent, first, second = (folder / "ids").read_text().split()
    files = {path.stem: path for path in (folder / "wandb").glob("offline-run-*/run-*.wandb")}
    assert files.keys() == {f"run-{id}" for id in (parent, first, second)}
    assert len(list((folder / "wandb").glob(f"offline-run-*-{first}*"))) == 2  # one for each process that wrote it

    records = offline_run(files[f"run-{second}"])
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.display_name, run.run_group, run.project) == (second, "trial 1", parent, "test")
    logged = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["step"], row["train/loss"]) for row in logged] == [(1, 0.5), (2, 0.5)]
    earlier = [(row["train/step"], row["craft/grad_conflict"]) for row in logged]
    assert earlier == [(row["step"], row["craft/conflict"]) for row in logged] == [(1, 0), (2, 1)]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]

    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "ids")
    assert b"lambda_lr" in everything
    for secret in (b"s3cret", b"in-the-environment"):
        assert secret not in everything


def test_online_without_a_key_is_reported_even_on_a_terminal(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from craft_ray.config import TrackingConfig\n"
        "from craft_ray.errors import ConfigError; from craft_ray.tracking import open_trackers\n"
        "try: open_trackers(TrackingConfig(wandb='online'), Path('.'))\n"
        "except ConfigError as error: print(error.message)"
    )
    unknown = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_") and key != "NETRC"}
    terminal, inside = os.openpty()
    with open(terminal, "rb"), open(inside, "rb+", buffering=0) as end:
        done = subprocess.run(
            [sys.executable, "-c", program], env={**unknown, "HOME": str(tmp_path)}, cwd=tmp_path, stdin=end,
            stdout=subprocess.PIPE, stderr=end, timeout=60, text=True, check=True,
        )  # fmt: skip
    assert done.stdout.startswith("tracking.wandb=online needs a key: set WANDB_API_KEY")
    assert done.stdout.count("\n") == 1
    with server(401) as (address, _):
        refused = elsewhere(program, WANDB_API_KEY="k" * 40, WANDB_BASE_URL=f"http://{address}", HOME=str(tmp_path))
    assert (refused.stdout.count("\n"), refused.stderr) == (1, "")
    assert f"Weights & Biases refuses the login (Failed to authenticate with http://{address}" in refused.stdout
    assert "kkkk" not in refused.stdout


# --- both ---------------------------------------------------------------------------------------------------------


def test_off_imports_nothing() -> None:
    done = elsewhere(
        "import sys; from pathlib import Path; from craft_ray.config import TrackingConfig\n"
        "from craft_ray.tracking import open_trackers\n"
        "assert open_trackers(TrackingConfig(), Path('nowhere')) == []\n"
        "assert not {'mlflow', 'wandb', 'trackio', 'torch', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not Path('nowhere').exists()"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("missing", "setting", "remedy"),
    [
        ("mlflow", {"mlflow": "sqlite:///mlflow.db"}, "pip install 'craft-ray[mlflow]'"),
        ("alembic", {"mlflow": "sqlite:///mlflow.db"}, "pip install 'craft-ray[mlflow]'"),
        ("wandb", {"wandb": "offline"}, "pip install 'craft-ray[wandb]'"),
        ("trackio", {"trackio": "local"}, "pip install 'craft-ray[trackio]'"),
    ],
)
def test_a_missing_package_is_one_line(
    missing: str, setting: dict[str, Any], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_trackers(TrackingConfig(**setting), tmp_path)
    assert caught.value.message.startswith(f"tracking.{next(iter(setting))} is set, but {missing} does not import")
    assert caught.value.message.endswith(remedy)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_runs_does_not_pass_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If W&B is not installed, its folder in the working directory would be imported instead."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"wandb does not import .*: pip install 'craft-ray\[wandb\]'"):
        open_trackers(TrackingConfig(wandb="offline"), tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_passwords_are_removed_from_parameters() -> None:
    found = flatten({"a": {"uri": "https://me:p@ss@host:1/x", "list": ["s3://k:v@b"]}, "empty": {}, "b": 1})
    assert found == {"a.uri": "https://***@host:1/x", "a.list": ["s3://***@b"], "empty": {}, "b": 1}
    assert without_credentials("sqlite:////a/b.db and me@home.org") == "sqlite:////a/b.db and me@home.org"


class RecordingObserver(NullObserver):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.events: list[Any] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def steps(self, records: Sequence[Record]) -> None:
        self.events.append(records)

    def validated(self, record: Record) -> None:
        self.events.append(record)

    def done(self, result: dict[str, Any]) -> None:
        self.events.append(result)


class RecordingRun:
    id = "recording"

    def __init__(self, fails: bool = False) -> None:
        self.records: list[Record] = []
        self.ended: list[Status] = []
        self.fails = fails

    def reached(self) -> int:
        return 0

    def log(self, records: Sequence[Record]) -> None:
        if self.fails:
            raise StorageError("the tracker is gone")
        self.records += records

    def end(self, status: Status) -> None:
        self.ended.append(status)


def test_the_observer_logs_all_events_and_passes_them_on() -> None:
    inner, run = RecordingObserver(), RecordingRun()
    steps: list[Record] = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    validation: Record = {"step": 2, "new/score": 0.75}
    result = {"name": "x", "steps": 2, "feasible": True, "new": {"metric": "choice", "after": 0.5, "before": None}}
    with TrackingObserver(inner, [run]) as observer:
        observer.note("hello")
        observer.steps(steps)
        observer.validated(validation)
        assert run.ended == []
        observer.done(result)
        assert run.ended == ["finished"]
    assert run.ended == ["finished"]
    assert run.records == [
        *steps,
        validation,
        {"step": 2, "result/steps": 2, "result/feasible": True, "result/new/after": 0.5},
    ]
    assert inner.notes == ["hello"]
    assert inner.events == [steps, validation, result]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Interrupted("x"), "stopped"), (KeyboardInterrupt(), "stopped"), (ValueError("x"), "failed")],
)
def test_the_observer_says_how_a_run_ended(error: BaseException, status: Status) -> None:
    run = RecordingRun()
    with pytest.raises(type(error)), TrackingObserver(RecordingObserver(), [run]):
        raise error
    assert run.ended == [status]


def test_a_tracker_that_fails_is_reported_once_and_costs_nothing_else() -> None:
    inner, gone, well = RecordingObserver(), RecordingRun(fails=True), RecordingRun()
    with TrackingObserver(inner, [gone, well]) as observer:
        observer.steps([{"step": 1, "x": 1.0}])
        observer.steps([{"step": 2, "x": 1.0}])
    assert inner.notes == ["the tracker is gone; the run continues without it, the run folder has all metrics"]
    assert [record["step"] for record in well.records] == [1, 2]
    assert (gone.ended, well.ended) == ([], ["finished"])
