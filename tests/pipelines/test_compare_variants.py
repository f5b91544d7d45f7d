"""Variants of a comparison: arms with their own settings on the same cache, distinguished by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from craft_pipelines.compare import arm_config, compare, preferred

from craft_ray.config import Experiment
from craft_ray.errors import CacheRefused, ConfigError, StorageError
from craft_ray.report.html import write_report
from craft_ray.run.folder import RunFolder
from craft_ray.run.locks import only_command
from tests.support.experiments import Digits

PREFIX = {"retention_mode": "hidden", "positions": ["text_last"], "epsilon_start": 11.0}
LAST = {"positions": ["last_token"], "epsilon_start": 12.0}


def experiment(digits: Digits, folder: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    """Two variants on a cache with two positions, with budgets that are met."""
    return digits.experiment(
        folder,
        {
            **digits.scored(limit=8),
            "anchors.positions": ["text_last", "last_token"],
            "craft.epsilon_start": 10.0,
            "compare.seeds": [0],
            "compare.variants": {"prefix": PREFIX, "last": LAST},
            **(changes or {}),
        },
    )


def test_a_variant_is_the_config_with_its_own_settings(digits: Digits, tmp_path: Path) -> None:
    nats = {"craft.retention_mode": "token_ce", "craft.epsilon_start": 0.1, "craft.epsilon_end": None}
    config = experiment(digits, tmp_path, nats)
    runs = {arm: arm_config(config, arm, 3, tmp_path, config.compare.chosen) for arm in config.compare.chosen}
    assert list(runs) == ["baseline", "token_ce", "hidden", "prefix", "last"]
    assert [run.run_name for run in runs.values()] == [f"digits-{arm}-seed3" for arm in runs]
    adapted = [run.changed({"adapter.r": 2}) for run in runs.values()]
    assert [run.run_name for run in adapted] == [f"digits-{arm}-lora-seed3" for arm in runs]
    assert [run.arm for run in runs.values()] == list(runs)
    default = {"epsilon_start": 0.05, "epsilon_unit": "relative_mse"}  # a budget in nats is none of hidden states
    assert runs["prefix"].craft == config.craft.model_copy(update={**default, **PREFIX, "positions": ("text_last",)})
    assert runs["last"].craft.retention_mode == "token_ce", "a variant that names no mode has the config's"
    assert runs["hidden"].craft == config.craft.model_copy(update={**default, "retention_mode": "hidden"})
    assert not runs["baseline"].craft.enabled


def test_an_arm_of_another_unit_needs_a_budget_of_its_own(digits: Digits, tmp_path: Path) -> None:
    """The config itself is right: who compares only hidden states needs no budget in nats."""
    config = experiment(digits, tmp_path)
    assert arm_config(config, "hidden", 0, tmp_path, ["hidden"]).craft == config.craft
    for arm in ("token_ce", "baseline"):
        with pytest.raises(ConfigError) as caught:
            arm_config(config, arm, 0, tmp_path, [arm, "token_ce"])
        assert caught.value.exit_code == 2
        assert (
            "compare.token_ce.epsilon_start is missing: the loss of token_ce is counted in nats" in caught.value.message
        )
    given = experiment(digits, tmp_path, {"compare.token_ce": {"epsilon_start": 0.8}})
    assert arm_config(given, "token_ce", 0, tmp_path, ["token_ce"]).craft.epsilon_start == 0.8


def test_plain_fine_tuning_is_measured_by_the_preferred_arm(digits: Digits, tmp_path: Path) -> None:
    config = experiment(digits, tmp_path, {"compare.token_ce": {"epsilon_start": 20.0}})

    def measured_by(*arms: str) -> tuple[str, float, tuple[str, ...] | None]:
        craft = arm_config(config, "baseline", 0, tmp_path, ("baseline", *arms)).craft
        return craft.retention_mode, craft.epsilon_start, craft.positions

    assert preferred(config, config.compare.chosen) == "hidden"
    assert measured_by("prefix", "token_ce", "hidden") == ("hidden", 10.0, None)
    assert measured_by("prefix", "token_ce") == ("token_ce", 20.0, None)
    assert measured_by("last", "prefix") == ("hidden", 11.0, ("text_last",))
    assert measured_by() == ("hidden", 10.0, None)


def test_a_variant_can_be_added_to_a_finished_comparison(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = experiment(digits, tmp_path, {"compare.variants": {"prefix": PREFIX}})
    result = compare(first, ("baseline", "prefix"), (0,), tmp_path / "out")
    assert [run["arm"] for run in result["runs"]] == ["baseline", "prefix"]
    printed = capsys.readouterr().out
    assert "[prefix seed 0] Step 6/6" in printed
    assert printed.count("M trainable parameters") == 1, "both runs note it"

    more = experiment(digits, tmp_path)
    result = compare(more, ("baseline", "prefix", "last"), (0,), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "2 of 3 runs are finished already" in printed
    assert "[prefix" not in printed
    assert list(result["summary"]) == ["baseline", "prefix", "last"]
    assert [result["summary"][arm]["epsilon"] for arm in ("prefix", "last")] == [11.0, 12.0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "CRaFT prefix" in page
    assert "CRaFT last" in page
    runs = [RunFolder(tmp_path / "out" / "runs" / f"digits-{arm}-seed0") for arm in ("last", "prefix")]
    assert list(write_report(runs, tmp_path, title="", command="")["summary"]) == ["last", "prefix"]

    # Nothing trains beside a finished run that another cache was used for.
    found = json.loads(runs[1].result.read_text())
    runs[1].result.write_text(json.dumps(found | {"cache": "c0ffee"}))
    (runs[0].result).unlink()
    with pytest.raises(CacheRefused, match=rf"with the anchor cache c0ffee, and craft.* holds {found['cache']}: rest"):
        compare(more, ("baseline", "prefix", "last"), (0,), tmp_path / "out")
    assert runs[0].finished() is None


class Book:
    """A tracker that notes what it is given."""

    name = "book"

    def __init__(self) -> None:
        self.logged: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}

    def start(self, name: str, params: Any, parent: Any = None, id: str | None = None) -> Page:
        return Page(self, name)


class Page:
    def __init__(self, book: Book, id: str) -> None:
        self.book, self.id = book, id

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.book.logged.setdefault(self.id, []).extend(record["step"] for record in records)

    def end(self, status: str) -> None:
        self.book.ended[self.id] = status


def test_each_run_of_a_comparison_is_tracked_and_locked(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Book()
    monkeypatch.setattr("craft_pipelines.compare.open_trackers", lambda *_: [book])
    config = experiment(digits, tmp_path, {"compare.variants": {"prefix": PREFIX}})
    runs = [f"digits-{arm}-seed0" for arm in ("baseline", "prefix")]
    with (
        only_command(RunFolder(tmp_path / "out" / "runs" / runs[1])),
        pytest.raises(ConfigError, match="another process"),
    ):
        compare(config, ("baseline", "prefix"), (0,), tmp_path / "out")
    book.ended.clear()
    compare(config, ("baseline", "prefix"), (0,), tmp_path / "out")
    assert book.ended == dict.fromkeys(runs, "finished")
    assert all(set(range(1, 7)) <= set(book.logged[run]) for run in runs)


def test_a_tracker_that_stops_is_reported_and_mistakes_come_before_the_cache(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = experiment(digits, tmp_path, {"compare.variants": {"prefix": PREFIX}})

    def refused(*_: Any) -> list[Book]:
        raise ConfigError("no such tracker")

    monkeypatch.setattr("craft_pipelines.compare.open_trackers", refused)
    with pytest.raises(ConfigError, match="no such tracker"):
        compare(config, ("prefix",), (0,), tmp_path / "out")
    assert not (tmp_path / "anchors").exists()

    def lost(page: Page, records: Sequence[Mapping[str, Any]]) -> None:
        raise StorageError("the book is full")

    monkeypatch.setattr(Page, "log", lost)
    monkeypatch.setattr("craft_pipelines.compare.open_trackers", lambda *_: [Book()])
    compare(config, ("prefix",), (0,), tmp_path / "out")
    assert "[prefix seed 0] the book is full; the run continues without it" in capsys.readouterr().out


def test_a_variant_that_the_cache_cannot_serve_is_refused_before_any_run(digits: Digits, tmp_path: Path) -> None:
    odd = {"compare.variants": {"odd": {"positions": ["first_token"]}}}
    config = experiment(digits, tmp_path, odd)
    with pytest.raises(CacheRefused, match="first_token"):
        compare(config, ("baseline", "odd"), (0,), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))
