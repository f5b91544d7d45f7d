"""cluster/local, as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parents[2] / "cluster" / "local" / "cluster.py"


def local(state: Path, *arguments: str) -> tuple[int, str, str]:
    """`cluster.py ARGUMENTS...` on this folder -> exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--state", state, *arguments], capture_output=True, text=True, timeout=800, check=False
    )
    return done.returncode, done.stdout, done.stderr


def exported(out: str) -> dict[str, str]:
    lines = [line.removeprefix("export ").split("=", 1) for line in out.splitlines()]
    return {name: value.strip("'") for name, value in lines}


def marked(mark: str) -> list[psutil.Process]:
    """The processes with this cluster's mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CRAFT_RAY_CLUSTER") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, OSError):
            continue
    return found
