"""Ctrl-C and SIGTERM end the command with one line and exit code 130, whatever runs at that moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import ray
from craft_pipelines import session

from craft_ray import interruption
from craft_ray.errors import Interrupted

START = """
import os, signal, sys, time
from craft_pipelines import cli
from craft_ray.errors import ConfigError
sys.argv = ["craft-ray", "train", "run.yaml"]
def load_config(*_):
    print("working", flush=True)
    {body}
cli.load_config = load_config
cli.main()
"""
KILL = "os.kill(os.getpid(), signal.{name})"
BODIES = {
    "nothing swallows it": KILL + "; time.sleep(60)",
    "a library catches every Exception": "try: " + KILL + "; time.sleep(60)\n    except Exception: pass",
    "a library catches everything and gives another reason": (
        "try: " + KILL + "; time.sleep(60)\n    except BaseException: raise ConfigError('no such model') from None"
    ),
    "a library catches everything, and the command goes to its end": (
        "try: " + KILL + "; time.sleep(60)\n    except BaseException: sys.exit(0)"
    ),
}


def started(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START.format(body=body)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_exit_code_130(name: str) -> None:
    running = [started(body.format(name=name)) for body in BODIES.values()]
    for process, what in zip(running, BODIES, strict=True):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 130, (what, err)
        assert err.splitlines() == [err.strip()], (what, err)
        assert err.startswith("craft-ray: interrupted"), (what, err)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a command: a signal interrupts it."""
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    for name in ("_listening", "_signalled"):
        monkeypatch.setattr(interruption, name, False)
    interruption.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interruption.SIGNALS)
@pytest.mark.usefixtures("listening")
def test_a_signal_that_the_start_of_ray_swallows_ends_the_command(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    swallowed = []

    def init(**_: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            swallowed.append(error)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(session, "_dashboard", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(Interrupted) as caught:
        session.join()
    assert caught.value.exit_code == 130
    assert [type(error) for error in swallowed] == [Interrupted]


@pytest.mark.usefixtures("listening")
def test_ray_that_takes_a_signal_for_itself_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    monkeypatch.setattr(session, "_dashboard", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    session.join()
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_ends_the_process_at_once() -> None:
    process = started("""
    try:
        print("in the block", flush=True)
        time.sleep(60)
    finally:
        print("cleaning up", flush=True)
        time.sleep(60)
    """)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["working\n", "in the block\n"]
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning up\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode in (-signal.SIGINT, 130)
    assert time.monotonic() - sent < 20


def test_a_signal_during_the_imports_is_exit_code_130() -> None:
    program = """
import os, signal, sys
class Library:
    def find_spec(self, name, *_):
        if name == "typer": os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Library())
from craft_pipelines.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("craft-ray: interrupted")
