"""Small real experiments that several tests share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_ray.config import Experiment, parse_config

COLUMNS = {"id": "id", "image": "image", "prompt": "prompt"}
ANSWERED = {**COLUMNS, "response": "response"}


@dataclass(frozen=True)
class Digits:
    """The tiny PaliGemma, {old,new}_{train,val,test}.parquet and anchors.parquet. Shared: do not write into them."""

    model: Path
    """Folder of the model and its processor."""
    data: Path

    def experiment(self, folder: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
        """A few steps on the digits in this process, with all files below `folder`."""
        return parse_config(self._tree(folder), "test").changed(changes or {})

    def scored(self, limit: int = 24) -> dict[str, Any]:
        """Changes that add an evaluation of both skills."""
        return {
            f"evaluation.{skill}": {
                "data": {"path": str(self.data / f"{skill}_test.parquet"), "columns": ANSWERED, "limit": limit},
                "max_new_tokens": 2,
            }
            for skill in ("old", "new")
        }

    def _tree(self, folder: Path) -> dict[str, Any]:
        return {
            "name": "digits",
            "output_dir": str(folder / "runs"),
            "model": {"kind": "vision_language", "path": str(self.model)},
            "task": {"path": str(self.data / "new_train.parquet"), "columns": ANSWERED},
            "anchors": {
                "source": {"path": str(self.data / "anchors.parquet"), "columns": COLUMNS, "limit": 48},
                "positions": ["text_last"],
                "rows_per_shard": 16,
                "max_new_tokens": 2,
            },
            "craft": {
                "anchor_cache_dir": str(folder / "anchors"),
                "anchor_batch_size": 8,
                "epsilon_start": 0.001,
                "conflict_threshold": 0.5,  # the projection fires at nearly every step
            },
            "train": {
                "steps": 6,
                "batch_size": 8,
                "learning_rate": 2e-3,
                "warmup_steps": 2,
                "checkpoint_every": 2,
                "check_minutes": 0,  # decoding all images would take longer than the steps
            },
            "workers": {"num_workers": 0},
        }
