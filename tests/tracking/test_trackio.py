"""Metrics reach trackio's real store, which its own interface reads back. Its versions do not fit constraints.txt, so
this runs in the environment of LeRobot."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from craft_ray.config import TrackingConfig
from craft_ray.errors import ConfigError, StorageError
from craft_ray.run.observers import NullObserver
from craft_ray.tracking import STATUS, Tracker, TrackingObserver, open_trackers

pytest.importorskip("trackio", reason="trackio is not installed (extra trackio)")

CONFIG = TrackingConfig(trackio="local", project="test")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "store")
    return sqlite_storage.SQLiteStorage


def only(config: TrackingConfig = CONFIG) -> Tracker:
    (tracker,) = open_trackers(config, Path("nowhere"))
    return tracker


def logged(store: Any, id: str, key: str) -> list[tuple[int, float]]:
    rows = store.get_logs("test", None, run_id=id)
    return [(row["step"], row[key]) for row in rows if key in row]


def test_children_are_open_at_once_in_the_group_of_their_parent(store: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = only()
    parent = tracker.start("sweep", {"tracking": {"mlflow": "http://me:s3cret@host"}, "craft": {"lambda_lr": 0.1}})
    first, second = tracker.start("trial", {"x": 1}, parent), tracker.start("trial", {"x": 2}, parent)
    for step in (1, 2):
        first.log([{"step": step, "train/loss": 1.0 / step, "craft/conflict": True, "craft/lambda": None}])
        second.log([{"step": step, "train/loss": 2.0 / step}])
    first.end("stopped")
    second.end("failed")
    parent.end("finished")
    configs = {run.id: store.get_run_config("test", run_id=run.id) for run in (parent, first, second)}
    assert [config[STATUS] for config in configs.values()] == ["finished", "stopped", "failed"]
    assert [config["_Group"] for config in configs.values()] == [None, parent.id, parent.id]
    assert configs[parent.id]["craft.lambda_lr"] == 0.1
    assert configs[parent.id]["tracking.mlflow"] == "http://***@host"
    assert all(config["_Username"] is None for config in configs.values())
    assert logged(store, first.id, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert logged(store, second.id, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert logged(store, first.id, "craft/conflict") == [(1, 1.0), (2, 1.0)]
    assert logged(store, first.id, "craft/lambda") == []
    assert first.reached() == 2
    assert capfd.readouterr() == ("", "")


def test_a_continued_run_keeps_its_parameters(store: Any) -> None:
    run = only().start("run", {"seed": 0})
    run.log([{"step": 3, "x": 1.0}])
    run.end("stopped")
    created = store.get_run_config("test", run_id=run.id)["_Created"]
    again = only().start("run", {"seed": 1, "further": "x"}, id=run.id)
    assert (again.id, again.reached()) == (run.id, 3)
    found = store.get_run_config("test", run_id=run.id)
    assert (found["seed"], found["further"], found[STATUS], found["_Created"]) == (0, "x", "running", created)
    again.log([{"step": 4, "x": 2.0}])
    again.end("finished")
    assert logged(store, run.id, "x") == [(3, 1.0), (4, 2.0)]
    assert store.get_run_config("test", run_id=run.id)[STATUS] == "finished"
    with pytest.raises(ConfigError, match="trackio has no run 0123 in the project test"):
        only().start("run", {}, id="0123")


def test_odd_numbers_and_empty_records(store: Any) -> None:
    run = only().start("odd", {})
    run.log([{"step": i, "a": float(i), "b": math.inf, "c": math.nan} for i in range(500)])
    run.log([])
    run.log([{"step": 500, "a": None}])
    assert len(logged(store, run.id, "a")) == 500
    assert logged(store, run.id, "b")[0] == (0, math.inf)
    assert run.reached() == 499


def test_a_store_that_breaks_is_reported_once_and_the_run_goes_on(tmp_path: Path) -> None:
    run = only().start("run", {})
    with closing(sqlite3.connect(tmp_path / "store" / "test.db")) as connection:
        connection.execute("create trigger no before insert on metrics begin select raise(abort, 'full'); end")
        connection.commit()
    with pytest.raises(StorageError, match="trackio's store of test does not accept metrics"):
        run.log([{"step": 1, "x": 1.0}])

    class Notes(NullObserver):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    inner = Notes()
    with TrackingObserver(inner, [run]) as observer:
        observer.steps([{"step": 1, "x": 1.0}])
        observer.steps([{"step": 2, "x": 1.0}])
    assert len(inner.notes) == 1
    assert inner.notes[0].endswith("the run continues without it, the run folder has all metrics")


def test_what_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.project is registry-x, which trackio refuses"):
        only(TrackingConfig(trackio="local", project="registry-x"))
    (tmp_path / "store").write_text("a file")
    with pytest.raises(ConfigError, match="trackio's store of test does not open; TRACKIO_DIR names another folder"):
        only()


PROGRAM = """
from pathlib import Path
from craft_ray.config import TrackingConfig
from craft_ray.tracking import open_trackers
(tracker,) = open_trackers(TrackingConfig(trackio="local", project="test"), Path("nowhere"))
run = tracker.start("run", {"seed": 0})
run.log([{"step": 1, "x": 1.0}])
run.end("finished")
import trackio
(seen,) = trackio.Api().runs("test")
assert (seen.name, seen.config["seed"]) == ("run", 0), seen
"""


def test_the_store_is_in_trackios_folder_and_its_own_interface_shows_the_run(tmp_path: Path) -> None:
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "mine"), "SECRET_TOKEN": "in-the-environment"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "mine" / "test.db").is_file()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"in-the-environment" not in everything
