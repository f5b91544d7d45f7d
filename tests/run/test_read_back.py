"""What a run saves is what it trained: its first checkpoint is loaded again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from craft_ray.errors import ModelError
from craft_ray.models.huggingface import HuggingFaceModel
from craft_ray.run import saving
from craft_ray.run.checkpoint import check_saved
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.storage.last import last_checkpoint
from craft_ray.workers import OneWorker
from tests.support.experiments import Digits


class Notes(NullObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def run(digits: Digits, folder: Path, checks: list[Path], monkeypatch: pytest.MonkeyPatch) -> tuple[RunFolder, Notes]:
    """A plain run that saves at steps 2, 4 and 6; the folders that are checked are added to `checks`."""

    def recorded(config: Any, precision: Any, model: Any, saved: Path) -> None:
        checks.append(saved)
        check_saved(config, precision, model, saved)

    monkeypatch.setattr(saving, "check_saved", recorded)
    config = digits.experiment(folder, {"craft.enabled": False, "craft.anchor_cache_dir": None})
    files, notes = RunFolder(folder / "run"), Notes()
    files.begin(config, ["test"])
    train(config, files, OneWorker(), notes)
    return files, notes


def changing(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change` act on the weights of every folder that is saved."""
    before = HuggingFaceModel.save

    def save(self: HuggingFaceModel, folder: Path, final: Path | None = None) -> None:
        before(self, folder, final)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(HuggingFaceModel, "save", save)


def test_the_first_checkpoint_is_read_back_once(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[Path] = []
    folder, notes = run(digits, tmp_path, checks, monkeypatch)
    assert [path.parent.name for path in checks] == ["step_000002"]
    assert sum("loaded again" in line for line in notes.lines) == 1
    assert folder.finished() is not None


def one_bit(weights: dict[str, Tensor]) -> None:
    weights[some_matrix(weights)].view(torch.int32).view(-1)[-1] ^= 1


def one_missing(weights: dict[str, Tensor]) -> None:
    del weights[some_matrix(weights)]


def some_matrix(weights: dict[str, Tensor]) -> str:
    return next(name for name, weight in sorted(weights.items()) if weight.ndim == 2 and "mlp" in name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(one_bit, "what was saved is not what was trained: 1 of"), (one_missing, "what was saved does not load: ")],
)
def test_other_weights_than_those_in_memory_end_the_run(
    change: Any, expected: str, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing(monkeypatch, change)
    with pytest.raises(ModelError) as caught:
        run(digits, tmp_path, [], monkeypatch)
    assert expected in caught.value.message
    assert "\n" not in caught.value.message
    checkpoints = RunFolder(tmp_path / "run").disk / "checkpoints"
    assert last_checkpoint(checkpoints) is None
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == ["refused_step_000002"]
    assert str(checkpoints / "refused_step_000002") in caught.value.message
