"""What a user sees of a check of many rows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from craft_pipelines import console
from craft_pipelines.console import FileObserver, Screen, following, readable_seconds
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from craft_ray.run.observers import NullObserver


def test_lines_are_sparse_and_say_how_long_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    progress = Screen(None)
    for second in range(0, 25, 2):
        now = 100.0 + second
        progress.progress("checking the rows of task", 10 * second, 4000, 150.0)
    progress.progress("checking the rows of task", 4000, 4000, 0.0)
    assert capsys.readouterr().out.splitlines() == [
        "checking the rows of task: 120 of 4000, about 2 min left",
        "checking the rows of task: 240 of 4000, about 2 min left",
    ]


def test_a_terminal_has_a_bar_while_rows_are_checked() -> None:
    screen = io.StringIO()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=screen, force_terminal=True), auto_refresh=False) as bars:
        progress = Screen(bars)
        progress.progress("checking the rows of task", 1000, 4000, 150.0)
        assert [(task.description, task.percentage) for task in bars.tasks] == [("checking the rows of task", 25.0)]
        bars.refresh()
        progress.progress("checking the rows of task", 4000, 4000, 0.0)
        assert not bars.tasks
        progress.progress("checking the rows of evaluation.new.data", 1, 2, 1.0)
        assert [task.percentage for task in bars.tasks] == [50.0]
    assert "checking the rows of task" in screen.getvalue()


def test_progress_comes_from_a_worker_through_its_file(tmp_path: Path) -> None:
    seen: list[tuple[str, float, int, float]] = []

    class Screen(NullObserver):
        def progress(self, what: str, done: float, total: int, left_s: float) -> None:
            seen.append((what, done, total, left_s))

    with following(tmp_path / "messages", Screen()):
        FileObserver(tmp_path / "messages").progress("task", 3, 9, 4.5)
    assert seen == [("task", 3, 9, 4.5)]


@pytest.mark.parametrize(
    ("seconds", "said"), [(1, "1 s"), (59, "59 s"), (60, "1 min"), (3599, "60 min"), (5400, "1.5 h")]
)
def test_durations_in_words(seconds: float, said: str) -> None:
    assert readable_seconds(seconds) == said
