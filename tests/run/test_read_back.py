"""What a run saves is what it trained: its first checkpoint is loaded again and compared."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from craft_pipelines.interpolate import interpolate
from craft_pipelines.merge import merge
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from craft_ray.config import ModelConfig
from craft_ray.errors import ConfigError, ModelError, StorageError
from craft_ray.models import load_model
from craft_ray.models.huggingface import HuggingFaceModel
from craft_ray.run import saving
from craft_ray.run.checkpoint import check_saved, save_model
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.sharded_checkpoint import _writing, check_exported
from craft_ray.run.training import train
from craft_ray.storage.last import last_checkpoint
from craft_ray.workers import OneWorker
from tests.support.experiments import Digits

PLAIN: Mapping[str, Any] = {"craft.enabled": False, "craft.anchor_cache_dir": None}
LORA: Mapping[str, Any] = {**PLAIN, "adapter": {"r": 2}}


class Notes(NullObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def run(
    digits: Digits,
    folder: Path,
    checks: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: Mapping[str, Any] = PLAIN,
) -> tuple[RunFolder, Notes]:
    """A run that saves at steps 2, 4 and 6; the folders that are checked are added to `checks`."""

    def recorded(config: Any, precision: Any, model: Any, saved: Path) -> None:
        checks.append(saved)
        check_saved(config, precision, model, saved)

    monkeypatch.setattr(saving, "check_saved", recorded)
    config = digits.experiment(folder, changes)
    files, notes = RunFolder(folder / "run"), Notes()
    files.begin(config, ["test"])
    train(config, files, OneWorker(), notes)
    return files, notes


def changing(monkeypatch: pytest.MonkeyPatch, change: Any, name: str = "model.safetensors") -> None:
    """Let `change` act on the weights of every folder that is saved."""
    before = HuggingFaceModel.save

    def save(self: HuggingFaceModel, folder: Path, final: Path | None = None) -> None:
        before(self, folder, final)
        changed(folder / name, change)

    monkeypatch.setattr(HuggingFaceModel, "save", save)


def changed(file: Path, change: Any) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("changes", [PLAIN, LORA], ids=["full", "LoRA"])
def test_the_first_checkpoint_is_read_back_once(
    changes: Mapping[str, Any], digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[Path] = []
    folder, notes = run(digits, tmp_path, checks, monkeypatch, changes)
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
    with pytest.raises(ModelError) as again:  # the folder that was put aside is in nobody's way
        run(digits, tmp_path, [], monkeypatch)
    assert again.value.message == caught.value.message


def one_bit_of_an_adapter(weights: dict[str, Tensor]) -> None:
    weights[next(name for name in sorted(weights) if "lora_B" in name)].view(torch.int32).view(-1)[-1] ^= 1


def test_another_adapter_than_the_one_in_memory_ends_the_run(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing(monkeypatch, one_bit_of_an_adapter, "adapter_model.safetensors")
    with pytest.raises(ModelError, match="what was saved is not what was trained: 1 of"):
        run(digits, tmp_path, [], monkeypatch, LORA)
    assert last_checkpoint(RunFolder(tmp_path / "run").disk / "checkpoints") is None


# -- plain folders


def test_a_plain_folder_that_is_not_the_model_is_not_left(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=str(text_model))
    model = load_model(config, "fp32")
    save_model(config, "fp32", model, tmp_path / "right", "merged")
    assert (tmp_path / "right" / "config.json").exists()
    changing(monkeypatch, one_bit)
    with pytest.raises(ModelError) as caught:
        save_model(config, "fp32", model, tmp_path / "wrong", "merged")
    assert caught.value.message.startswith("what was saved is not what was merged: 1 of ")
    assert caught.value.message.endswith(f"; {tmp_path / 'wrong'} was not written")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


@pytest.mark.parametrize("command", ["merge", "interpolate"])
def test_what_a_command_saves_is_read_back(
    command: str, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = digits.experiment(tmp_path, {**LORA, "train.steps": 1, "train.warmup_steps": 0})
    files = RunFolder(tmp_path / "run")
    files.begin(config, ["test"])
    train(config, files, OneWorker(), NullObserver())
    changing(monkeypatch, one_bit)
    made = {"merge": merge, "interpolate": partial(interpolate, alpha=0.5)}[command]
    with pytest.raises(ModelError, match=f"what was saved is not what was {command}d: 1 of"):
        made(files.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- sharded runs: the folder of the last step (tests/run/test_sharding.py writes one with two workers)


def test_a_folder_of_a_sharded_run_is_compared_with_what_was_trained(text_model: Path, tmp_path: Path) -> None:
    config = ModelConfig(path=str(text_model))
    model = load_model(config, "fp32")
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.5)
    trained, folder = model.weights_fingerprint(), tmp_path / "step_000004" / "model"
    model.save(folder)
    check_exported(config, "fp32", trained, folder)
    changed(folder / "model.safetensors", one_bit)
    with pytest.raises(ModelError) as caught:
        check_exported(config, "fp32", trained, folder)
    assert caught.value.message.startswith(f"{folder} is not what was trained: its weights differ")
    assert caught.value.message.endswith(f"what was trained is in {tmp_path / 'step_000004' / 'sharded'}")
    assert "\n" not in caught.value.message


def test_a_full_disk_under_the_model_of_a_sharded_run_is_one_line(tmp_path: Path) -> None:
    message = r"could not be written \(No space left.*earlier checkpoints are untouched"
    with pytest.raises(StorageError, match=message), _writing(tmp_path):
        raise SafetensorError("No space left on device")


def test_what_a_gpu_computes_with_is_not_needed_to_read_weights(text_model: Path, tmp_path: Path) -> None:
    """The checkpoint of a run on a GPU is loaded on the host, where this attention does not run."""
    config = ModelConfig(path=str(text_model))
    model = load_model(config, "fp32")
    model.save(tmp_path / "model", final=tmp_path / "model")
    gpu = ModelConfig(path=str(text_model), attention="flex_attention", compile=True)
    with pytest.raises(ConfigError, match="trains on a GPU alone"):
        load_model(gpu, "fp32")
    check_saved(gpu, "fp32", model, tmp_path / "model")
