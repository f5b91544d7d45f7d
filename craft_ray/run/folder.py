"""The folder of a run: its config, its environment, its metrics, and its result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from craft_ray.config import Experiment, dump_config, parse_config, read_yaml
from craft_ray.errors import ConfigError
from craft_ray.run.metrics import Record
from craft_ray.storage.files import append_text, write_atomically
from craft_ray.storage.paths import StoragePath
from craft_ray.workers import Workers

PACKAGES = ("craft-ray", "torch", "transformers", "ray", "pyarrow", "datasets", "numpy")


class RunFolder:
    """`config.yaml`, `identity.json`, `env.json`, `metrics.jsonl`, `validation.jsonl`, `tensorboard/`, `checkpoints/`,
    `evaluation/`, `result.json`."""

    def __init__(self, path: StoragePath, shared: StoragePath | None = None) -> None:
        """
        Args:
            shared: folder where runs of the same teacher share its scores; None means the parent of the run's folder.
        """
        self.path = path
        self.home = path
        """Where the folder is kept and other processes read it. Only in a `RunMirror` does `path` differ from it."""
        self.shared = shared or path.parent
        self.metrics = path / "metrics.jsonl"
        self.validation = path / "validation.jsonl"
        self.checkpoints = path / "checkpoints"
        self.result = path / "result.json"
        self.progress = path / "progress.jsonl"

    @property
    def disk(self) -> Path:
        """The folder of a run that this process trains: it is on a disk or a mount (`mirrored_folder`)."""
        assert isinstance(self.path, Path)
        return self.path

    def begin(self, config: Experiment, command: Sequence[str]) -> None:
        """Write the run's config and its environment."""
        self.write_config(config)
        self.write_environment(command)

    def write_config(self, config: Experiment) -> None:
        write_atomically(self.path / "config.yaml", dump_config(config))

    def write_environment(self, command: Sequence[str]) -> None:
        write_atomically(self.path / "env.json", json.dumps(environment(command), indent=2))

    def config(self) -> Experiment:
        if not (self.path / "config.yaml").exists():
            raise ConfigError(f"{self.path} is not a run directory: it has no config.yaml")
        tree = read_yaml((self.path / "config.yaml").read_text())
        if isinstance(tree, dict) and isinstance(tree.get("craft"), dict):
            tree["craft"].setdefault("lambda_floor", 0.0)  # saved by a version that had none; it saves every key
        return parse_config(tree, str(self.path / "config.yaml"))

    @property
    def started(self) -> bool:
        """Whether a step was taken. A run that failed before its first step may be restarted with another config."""
        return bool(self.metrics.exists() and self.metrics.stat().st_size) or self.result.exists()

    def finished(self) -> dict[str, Any] | None:
        """The result of a run that has finished; None before that."""
        return json.loads(self.result.read_text()) if self.result.exists() else None

    def append_metrics(self, records: Sequence[Record]) -> None:
        append_text(self.metrics, "".join(json.dumps(record) + "\n" for record in records))

    def read_metrics(self) -> list[Record]:
        return read_records(self.metrics)

    def append_validation(self, record: Record) -> None:
        append_text(self.validation, json.dumps(record) + "\n")

    def read_validation(self) -> list[Record]:
        return read_records(self.validation)

    def keep_metrics_until(self, step: int) -> None:
        """Drop the records after `step`: the run resumes from there and writes them again."""
        for path in (self.metrics, self.validation):
            kept = [record for record in read_records(path) if record["step"] <= step]
            if kept or path.exists() or path == self.metrics:
                write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write_predictions(self, name: str, records: Sequence[Record]) -> None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(self.path / "evaluation" / f"{name}.jsonl", lines)

    def read_predictions(self, name: str) -> list[Record]:
        return read_records(self.path / "evaluation" / f"{name}.jsonl")

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.result, json.dumps(result, indent=2))

    def pull(self) -> None:
        """Fetch what a process needs to resume the run. Nothing to do here: it is in this folder."""

    def checkpoint(self, name: str) -> Path:
        """A checkpoint that this process reads."""
        return self.disk / "checkpoints" / name

    def push(self) -> None:
        """Let other processes see what was written. Nothing to do here: they read this folder."""

    def push_parts(self, name: str, workers: Workers) -> None:
        """As `push_checkpoint`, for a checkpoint of which each worker has written a part; all of them call it."""

    def push_pointer(self, name: str) -> None:
        """Let other processes see that `last` points to a checkpoint that they see already. Nothing to do here."""

    def push_checkpoint(self) -> None:
        """Let other processes see the last checkpoint, and none that was removed. Nothing to do here."""


def read_records(path: StoragePath) -> list[Record]:
    """The complete lines of a JSON lines file; a last line that a crash cut off is skipped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Time, versions, commit and hardware. Of environment variables, only thread counts: others may hold secrets."""
    return {
        "command": list(command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
    }


@cache
def _commit() -> str | None:
    """The commit of this package's own checkout; None if it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout.strip() or None


def command_line() -> list[str]:
    """The current command, as a user would type it."""
    return ["craft-ray", *sys.argv[1:]]
