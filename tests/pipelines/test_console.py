"""What a user sees of work that takes long: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from craft_pipelines import console
from craft_pipelines.console import (
    ConsoleObserver,
    FileObserver,
    QuarterObserver,
    Screen,
    Together,
    following,
    readable_seconds,
)
from craft_pipelines.sweep.console import TrialLog
from craft_pipelines.sweep.following import RunningTrials
from craft_pipelines.sweep.tracking import SweepTracking
from ray import cloudpickle
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from craft_ray import pace
from craft_ray.config import parse_config
from craft_ray.pace import Pace
from craft_ray.run.observers import NullObserver
from craft_ray.sweep.space import parse_space
from craft_ray.sweep.trials import Plan, SweepFolder

SMALLEST = {
    "name": "a", "model": {"kind": "causal_lm", "path": "m"}, "task": {"path": "t.jsonl"}, "train": {"steps": 10},
}  # fmt: skip


def test_lines_are_sparse_and_say_how_long_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    progress = Screen(None)
    for second in range(0, 200, 2):
        now = 100.0 + second
        progress.progress("checking the rows of task", 10 * second, 4000, 150.0)
    progress.progress("checking the rows of task", 4000, 4000, 0.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "checking the rows of task: 120 of 4000, about 2 min left"
    assert [int(line.split(": ")[1].split()[0]) // 10 for line in lines] == [12, 24, 38, 58, 88, 134]


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


def test_a_look_at_the_file_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to an object store fails now and then, and a mount is away for a moment."""
    monkeypatch.setattr(console, "POLL_S", 0.01)
    noted: list[str] = []

    class Notes(NullObserver):
        def note(self, text: str) -> None:
            noted.append(text)

    path = tmp_path / "messages"
    with following(path, Notes()):
        path.mkdir()  # cannot be read
        time.sleep(0.2)
        path.rmdir()
        FileObserver(path).note("hello")
    assert noted == ["hello"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(1, "1 s"), (59, "59 s"), (60, "1 min"), (3599, "60 min"), (5400, "1.5 h")]
)
def test_durations_in_words(seconds: float, said: str) -> None:
    assert readable_seconds(seconds) == said


class Events(NullObserver):
    """The progress that a `Pace` reports, at made-up times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seen = 100.0, list[tuple[float, float]]()
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)

    def progress(self, what: str, done: float, total: int, left_s: float) -> None:
        self.seen.append((done, left_s))


def test_the_time_that_is_left_is_that_of_the_pace_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)
    work = Pace("work", 100, events.progress, before=20)
    for done in (21, 24, 30, 100):
        events.now += 1.5
        work.reached(done)
    work.end()
    # 4 in 3 s leave 76 for 57 s; then 10 in 4.5 s, too soon after the last report
    assert events.seen == [(24, pytest.approx(57)), (100, 0.0)]


def test_work_that_takes_no_time_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)
    work = Pace("work", 2, events.progress)
    work.reached(1)
    work.end()
    assert not events.seen


def test_what_several_runs_note_is_printed_once_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    together = Together(Screen(None), 2, 16)
    merges = "in 3 of 64 samples of the new skill a token would extend over the boundary of prompt and response"
    for label, other in (("hidden seed 0", "Retention mode: hidden"), ("token_ce seed 0", "Retention mode: token_ce")):
        path = tmp_path / label
        with following(path, QuarterObserver(label, 8, "hidden", together)):
            FileObserver(path).note(merges)
            FileObserver(path).note(other)
    assert capsys.readouterr().out.splitlines() == [
        f"[hidden seed 0] {merges}",
        "[hidden seed 0] Retention mode: hidden",
        "[token_ce seed 0] Retention mode: token_ce",
    ]


def test_a_trial_shows_its_notes_and_its_steps_before_its_first_validation(tmp_path: Path) -> None:
    config = parse_config(SMALLEST, "test").changed({"sweep.repeat": 2})
    plan = Plan(config, parse_space({"seed": {"grid": [0]}}, "s"), [])
    folder, said, parts = SweepFolder(tmp_path / "sweep"), list[str](), list[tuple[int, float]]()
    running = RunningTrials(folder, plan, Screen(None), said.append)
    for number in (0, 1):
        trial = folder.trial(number)
        trial.begin({"train.steps": 20} if number else {})
        for seed in (0, 1):
            trial.run(seed).path.mkdir(parents=True)
            FileObserver(trial.run(seed).progress).note("left by an interrupted sweep")
        running.add(trial, lambda number, part: parts.append((number, part)))
        for seed in (0, 1):
            observer = FileObserver(trial.run(seed).progress)
            observer.note("the new skill is a stream")
            observer.steps([{"step": 4}, {"step": 5}])
        running.remove(trial)
        assert not list(trial.path.rglob("progress.jsonl"))
    assert said == ["[trial 0] the new skill is a stream"]
    assert parts == [(0, 0.25), (0, 0.75), (1, 0.125), (1, 0.625)]


def test_tune_can_save_the_log_of_a_sweep_on_a_terminal(tmp_path: Path) -> None:
    """It saves its callbacks when a sweep starts, and a bar has locks."""
    folder, shown = SweepFolder(tmp_path / "sweep"), Screen(Progress())
    plan = Plan(parse_config(SMALLEST, "test"), parse_space({"seed": {"grid": [0]}}, "s"), [])
    tracking, running = SweepTracking(folder, plan, print), RunningTrials(folder, plan, shown, print)
    cloudpickle.dumps(TrialLog(folder, plan, 1, tracking, print, running, shown.progress))


@pytest.mark.parametrize("several", [False, True])
def test_between_two_retention_steps_each_line_shows_the_last_one(
    several: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Retention steps are 1 and 5, and each of the eight steps is logged."""
    record = dict.fromkeys(("train/loss", "train/grad_norm", "train/lr", "perf/step_s", "perf/data_s"), 0.5)
    record |= {"craft/lambda": 1.0, "craft/epsilon": 0.1, "craft/conflict": None, "craft/weight": 2.0}
    losses = {1: 0.25, 5: 0.75}
    observer = QuarterObserver("a", 8, "hidden", Together(Screen(None), 1, 8)) if several else ConsoleObserver(8, "b")
    for step in range(1, 9):
        observer.steps([{"step": step, **record, "craft/retention_loss": losses.get(step)}])
    lines = capsys.readouterr().out.splitlines()
    shown = range(2, 9, 2) if several else range(1, 9)
    assert len(lines) == len(shown)
    for step, line in zip(shown, lines, strict=True):
        last = 1 if step < 5 else 5
        assert f"L_ret={losses[last]:.3f} | λ=1.000 | ε=0.100 | weight=2.000" in line
        assert line.endswith("weight=2.000" if step == last else f"retention at step {last}")


def test_several_runs_share_one_bar_and_a_log_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    record = dict.fromkeys(("train/loss", "train/grad_norm", "train/lr", "perf/step_s", "perf/data_s"), 0.5)
    nothing = dict.fromkeys(("craft/retention_loss", "craft/lambda", "craft/epsilon", "craft/conflict"))
    steps = [{"step": step, **record, **nothing} for step in range(1, 9)]
    screen = io.StringIO()
    bars = Progress(BarColumn(), console=Console(file=screen, force_terminal=True), auto_refresh=False)
    for shown in (Screen(bars), Screen(None)):
        together = Together(shown, 2, 16)
        for label in ("hidden seed 0", "hidden seed 1"):
            observer = QuarterObserver(label, 8, "hidden", together)
            observer.steps(steps[:3])
            observer.steps(steps[3:])
    (task,) = bars.tasks
    assert (task.description, task.completed, task.total) == ("2 runs, steps", 16, 16)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 4
    assert all(character.isprintable() or character == "\n" for character in out)
