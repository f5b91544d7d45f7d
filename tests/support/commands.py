"""The command `craft-ray`: in a process of its own, as a user runs it, or in the test's process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from craft_ray.config import Experiment, dump_config

Command = Callable[..., tuple[int, str, str]]
"""`craft-ray ARGUMENTS...` in this process -> exit code, standard output, standard error; the fixture `command`."""


def command(*arguments: str | Path) -> subprocess.Popen[str]:
    """`craft-ray` as a user runs it."""
    return subprocess.Popen(
        [sys.executable, "-m", "craft_pipelines.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def saved(config: Experiment, folder: Path) -> Path:
    path = folder / f"{config.name}.yaml"
    path.write_text(dump_config(config))
    return path


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def one_line(err: str) -> str:
    """The one line of a mistake."""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("craft-ray: ")
    return lines[0]
