"""Runs whose task data are streamed: they are resumed exactly, and they say what they could not check."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from craft_ray.config import Experiment, parse_config
from craft_ray.data import streaming
from craft_ray.errors import ConfigError, DataError
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train
from craft_ray.workers import OneWorker
from tests.support.caches import built, prompts
from tests.support.runs import trained


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a pass the library gives Arrow's threads five seconds to end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def write(folder: Path, bad: int | None = None) -> None:
    """Three files with 14 rows together, of which one has no response that could be learnt."""
    folder.mkdir(parents=True)
    for number in range(3):
        rows = range(5 * number, min(5 * number + 5, 14))
        responses = ["long " * 40 if row == bad else f"answer {row}" for row in rows]
        table = pa.table({"prompt": [f"Call me {row}" for row in rows], "response": responses})
        pq.write_table(table, folder / f"train-{number}.parquet")


def experiment(model: Path, folder: Path, held: bool = False, **changes: Any) -> Experiment:
    """A run on a stream; `held` with a cache of anchors, which is built here, for the old skill."""
    tree = {
        "name": "streamed",
        "output_dir": str(folder / "runs"),
        "model": {"path": str(model), "max_length": 64},
        "task": {
            "path": str(folder / "data"),
            "streaming": True,
            "shuffle_buffer": 6,
            "columns": {"response": "response"},
        },
        "craft": {"enabled": False},
        "train": {"steps": 8, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2},
        "workers": {"num_workers": 0},
    }
    config = parse_config(tree, "test").changed(changes)
    if held:
        source = {"path": str(prompts(folder / "anchors.jsonl", [3, 1, 9, 4, 2, 6, 3, 8, 5, 2, 7, 4]))}
        cache = str(folder / "anchors")
        craft = {"anchor_cache_dir": cache, "anchor_batch_size": 4, "conflict_threshold": 0.5}
        config = config.changed({"craft": craft, "anchors": {"source": {**source, "columns": {"id": "id"}}}})
        built(config)
    return config


def losses(folder: RunFolder) -> list[float]:
    return [record["train/loss"] for record in folder.read_metrics()]


class Notes(NullObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("held", [False, True])
def test_a_resumed_run_goes_on_with_the_rows_that_were_next(held: bool, text_model: Path, tmp_path: Path) -> None:
    """Eight steps of four are more than two passes over 14 rows."""
    write(tmp_path / "data")
    config = experiment(text_model, tmp_path, held)
    whole = trained(config, tmp_path / "whole")
    for stop in (2, 6):  # in the first pass and in the second
        folder = RunFolder(tmp_path / f"stopped{stop}")
        folder.begin(config, ["test"])
        with closing(Run(config, folder, OneWorker(), NullObserver())) as run:
            run.loop(until=stop)
        notes = Notes()
        train(config, folder, OneWorker(), notes)
        assert losses(folder) == losses(whole)
        assert f"resuming after step {stop}" in notes.lines
    assert len(set(losses(whole))) == 8
    assert any(record["craft/retention_loss"] for record in whole.read_metrics()) == held


def test_a_run_says_what_is_checked_and_finds_a_bad_row_there(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", bad=3)
    folder = RunFolder(tmp_path / "run")
    config = experiment(text_model, tmp_path)
    folder.begin(config, ["test"])
    notes = Notes()
    with pytest.raises(DataError, match=r"task: .*, sample \d+ in the order of the seed has \d+ tokens, model.max"):
        train(config, folder, OneWorker(), notes)
    assert any("is a stream: its first 14 samples in the order of the seed are checked" in line for line in notes.lines)
    assert any("a stream of samples of the new skill" in line for line in notes.lines)
    assert not folder.read_metrics(), "before the first step"
    monkeypatch.setattr(streaming, "HEAD", 1)
    later = RunFolder(tmp_path / "later")
    later.begin(config, ["test"])
    with pytest.raises(DataError, match=r"sample \d+ in the order of the seed has \d+ tokens"):
        train(config, later, OneWorker(), NullObserver())


def test_a_run_is_not_resumed_on_other_files(text_model: Path, tmp_path: Path) -> None:
    write(tmp_path / "data")
    config = experiment(text_model, tmp_path)
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    with closing(Run(config, folder, OneWorker(), NullObserver())) as run:
        run.loop(until=2)
    (tmp_path / "data" / "train-2.parquet").unlink()
    with pytest.raises(ConfigError, match=r"task.path .* is not what it was when the run"):
        train(config, folder, OneWorker(), NullObserver())


def test_masking_by_loss_needs_all_samples_before(text_model: Path, tmp_path: Path) -> None:
    write(tmp_path / "data")
    config = experiment(text_model, tmp_path, **{"train.mask_loss_above": 2.5})
    folder = RunFolder(tmp_path / "run")
    folder.begin(config, ["test"])
    with pytest.raises(ConfigError, match=r"train.mask_loss_above 2.5 needs .* task.streaming reads them as training"):
        train(config, folder, OneWorker(), NullObserver())
