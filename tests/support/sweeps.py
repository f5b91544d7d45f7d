"""The metrics of sweeps in tests, and what must be equal in two sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from craft_ray.sweep.trials import Report
from tests.support.experiments import ANSWERED

BOUNDS = {"heldout/violation": "<= 1000", "old/ratio": ">= 0.001"}


def validated(data: Path, limit: int = 24) -> dict[str, Any]:
    """Changes that validate both skills every other step, with an objective whose bounds are kept. The metric is
    perplexity, which changes within a few steps and with the last bit of a weight."""
    sets = {
        f"validation.{skill}": {
            "data": {"path": str(data / f"{skill}_val.parquet"), "columns": ANSWERED, "limit": limit},
            "metric": "perplexity",
        }
        for skill in ("old", "new")
    }
    objective = {"maximize": "new/ratio", "subject_to": BOUNDS}
    return {**sets, "validation.every": 2, "train.checkpoint_every": 0, "objective": objective}


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file below a folder except locks: its inode, its size, and when it was written."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.name != ".lock"}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def untimed(found: Sequence[Report]) -> list[dict[str, Any]]:
    """Reports without measured times."""
    return [
        {
            **{key: value for key, value in report.items() if key not in ("seconds", "done", "metrics")},
            "metrics": {key: value for key, value in report["metrics"].items() if not key.startswith("perf/")},
        }
        for report in found
    ]
