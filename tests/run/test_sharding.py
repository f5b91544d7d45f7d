"""Runs whose workers share one model: they are the runs of one worker, and their checkpoints fit any number of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from craft_pipelines.anchors import build
from craft_pipelines.evaluate import model_folder
from craft_pipelines.merge import merge
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from craft_ray.config import Experiment, load_config, parse_config
from craft_ray.errors import ConfigError, CraftError, StorageError
from craft_ray.models import huggingface
from craft_ray.run.folder import RunFolder
from craft_ray.run.mirror import mirrored_folder
from craft_ray.run.observers import NullObserver
from craft_ray.run.sharded_checkpoint import FILES
from craft_ray.run.training import train, training
from craft_ray.storage.paths import ObjectPath, copy_tree, storage_path
from craft_ray.workers import OneWorker, Workers
from tests.support.processes import on_workers
from tests.support.runs import apart, trained_together

pytestmark = pytest.mark.slow  # two and four processes; tests/method/test_workers.py has the step itself

STEPS = 4
SHARDED = {"workers.num_workers": 2, "workers.sharding": "full"}
COLUMNS = {"id": "id", "prompt": "prompt", "response": "response"}

VARIANTS: dict[str, dict[str, Any]] = {
    "hidden": {},
    "hidden, every third step, accumulated": {"craft.retention_freq": 3, "train.accumulate": 2},
    "token_ce, accumulated, checkpointed": {
        "craft.retention_mode": "token_ce",
        "craft.epsilon_start": 1.0,
        "train.accumulate": 2,
        "model.gradient_checkpointing": True,
    },
    "baseline": {"craft.enabled": False},
    "lora": {"adapter": {"r": 4, "alpha": 8}, "train.learning_rate": 1e-2},
}


def experiment(model: Path, data: Path, folder: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    """A few steps of the byte-level Llama, whose embeddings are tied, with 7 held-out rows, which two workers cannot
    share evenly."""

    def held_out(skill: str, metric: str) -> dict[str, Any]:
        source = {"path": str(data / f"{skill}_test.parquet"), "columns": COLUMNS, "limit": 7}
        return {"data": source, "metric": metric, "batch_size": 2}

    rows = [
        {"id": f"c{i}", "prompt": f"{i} is ", "response": "a", "choices": ["a", "bc", "def", "g"][: 2 + i % 3]}
        for i in range(5)
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {"path": str(folder / "choices.jsonl"), "columns": {**COLUMNS, "choices": "choices"}}

    tree = {
        "output_dir": str(folder / "runs"),
        "model": {"kind": "causal_lm", "path": str(model)},
        "task": {"path": str(data / "new_train.parquet"), "columns": COLUMNS, "limit": 64},
        "anchors": {
            "source": {"path": str(data / "anchors.parquet"), "columns": {"id": "id"}, "limit": 37},
            "positions": ["last_token"],
            "modes": ["hidden", "token_ce"],
            "max_new_tokens": 3,
        },
        "craft": {
            "anchor_cache_dir": str(folder / "anchors"),
            "anchor_batch_size": 4,
            "epsilon_start": 1e-3,
            "conflict_threshold": 0.9,  # the projection fires at every retention step
            "projection_gate": "always",
        },
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 2e-3, "check_minutes": 0, "checkpoint_every": 2},
        "validation": {"new": {"data": chosen, "metric": "choice", "batch_size": 3}, "every": 2},
        "evaluation": {"old": held_out("old", "perplexity"), "new": held_out("new", "exact_match")},
        "workers": {"num_workers": 0},
    }
    tree["evaluation"]["new"]["max_new_tokens"] = 4
    return parse_config(tree, "test").changed(changes or {})


def all_of(workers: Workers, runs: dict[Path, Experiment]) -> None:
    for path, config in runs.items():
        trained_together(workers, config, path)


@dataclass(frozen=True)
class Told:
    """What one of two workers reports at its end."""

    loaded: int
    """How often it read the weights of a whole model."""
    refused: list[str]
    """What it said about each damaged checkpoint."""


def as_two(workers: Workers, folder: Path, runs: dict[Path, Experiment]) -> Told:
    """What two workers do in one process group: the runs, and the resumed and the damaged ones."""
    with mock.patch.object(huggingface, "load_module", wraps=huggingface.load_module) as load:
        all_of(workers, runs)
        return Told(refused=resuming(workers, folder, runs[folder / "two" / "hidden"]), loaded=load.call_count)


@pytest.fixture(scope="module")
def told(world: Path) -> list[Told]:
    return torch.load(world / "told.pt", weights_only=False)


@pytest.fixture(scope="module")
def world(text_model: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, and each variant trained by one worker and by two that share the model."""
    folder = tmp_path_factory.mktemp("sharding")
    build(experiment(text_model, text_data, folder), say=lambda _: None)
    one = {
        folder / "one" / name: experiment(text_model, text_data, folder, changes) for name, changes in VARIANTS.items()
    }
    all_of(OneWorker(), one)
    two = {folder / "two" / path.name: config.changed(SHARDED) for path, config in one.items()}
    torch.save(on_workers(2, as_two, folder / "processes", folder, two), folder / "told.pt")
    return folder


def weights(path: Path, name: str = "last") -> dict[str, Tensor]:
    (file,) = (path / "checkpoints" / name / "model").glob("*.safetensors")
    return load_file(file)


def measured(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in RunFolder(path).read_metrics()]


@pytest.mark.parametrize("name", VARIANTS)
def test_two_workers_that_share_a_model_are_one(name: str, world: Path) -> None:
    one, two = world / "one" / name, world / "two" / name
    for expected, found in zip(measured(one), measured(two), strict=True):
        assert alike(found, expected)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=2e-5)
    for expected, found in zip(*(RunFolder(path).read_validation() for path in (one, two)), strict=True):
        assert alike(found, expected)
    expected, found = (json.loads((path / "result.json").read_text()) for path in (one, two))
    for part in ("old", "new", "retention"):
        assert alike(found.get(part) or {}, expected.get(part) or {})
    assert found["anchor_agreement"] == expected["anchor_agreement"], (
        "the tokens that held-out anchors are continued by"
    )


def alike(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two records are the same, their numbers within rounding."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        near = pytest.approx(value, rel=2e-3, abs=1e-5, nan_ok=True) if isinstance(value, float) else value
        assert found[key] == near, f"{key}: {found[key]} instead of {value}"
    return True


FIRED = {
    "hidden": [False, True, True, True],
    "hidden, every third step, accumulated": [False, None, None, True],
    "token_ce, accumulated, checkpointed": [True, True, True, True],
    "lora": [False, True, True, True],
}
"""Whether the projection fires at each step; None: the step has no retention gradient. The retention gradient of
`hidden` is zero for a student that is still its teacher."""


@pytest.mark.parametrize("name", FIRED)
def test_the_projection_fires(name: str, world: Path) -> None:
    """Otherwise the comparison above would be of plain training."""
    assert [record.get("craft/projected") for record in measured(world / "two" / name)] == FIRED[name]


def test_one_worker_alone_reads_the_model(told: list[Told]) -> None:
    """So a host with several workers holds one whole copy while a run starts, also a run that resumes."""
    first, other = told
    assert first.loaded >= 2 * len(VARIANTS), "to begin with, and to compare what was saved"
    assert other.loaded == 0


# -- checkpoints


def cut(workers: Workers, path: Path, source: Path, step: int) -> None:
    """A run as it was when it had done `step` steps."""
    if workers.rank == 0:
        shutil.copytree(source, path, symlinks=True)
        (path / "result.json").unlink()
        checkpoints = path / "checkpoints"
        (checkpoints / "last").unlink()
        (checkpoints / "last").symlink_to(f"step_{step:06d}")
    workers.gather(None)


def resumed(workers: Workers, path: Path, source: Path, config: Experiment, step: int = 2) -> None:
    cut(workers, path, source, step)
    train(config, RunFolder(path), workers, NullObserver())


def refused(workers: Workers, path: Path, config: Experiment) -> str:
    try:
        train(config, RunFolder(path), workers, NullObserver())
    except CraftError as error:
        return str(error)
    return "no error"


def resuming(workers: Workers, folder: Path, config: Experiment) -> list[str]:
    """With as many workers as before, after one worker, and from checkpoints that were damaged."""
    resumed(workers, folder / "again", folder / "two" / "hidden", config)
    resumed(workers, folder / "two of one", folder / "one" / "hidden", config)
    adapted = load_config(folder / "two" / "lora" / "config.yaml")
    resumed(workers, folder / "again lora", folder / "two" / "lora", adapted)
    beside = config.changed({"train.checkpoint_async": True})
    trained_together(workers, beside, folder / "beside")
    resumed(workers, folder / "again beside", folder / "beside", beside)
    messages = []
    for damage in ("gone", "changed"):
        path = folder / damage
        cut(workers, path, folder / "two" / "hidden", 2)
        file = path / "checkpoints" / "step_000002" / "sharded" / "__1_0.distcp"
        if workers.rank == 0:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.unlink()
            if damage == "changed":
                file.write_bytes(content)
        workers.gather(None)
        messages.append(refused(workers, path, config))
    return messages


@pytest.mark.parametrize(
    ("name", "whole"), [("again", "hidden"), ("beside", "hidden"), ("again beside", "hidden"), ("again lora", "lora")]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str, whole: str, world: Path) -> None:
    """Also with checkpoints that are written while the next steps change the weights."""
    again, once = world / name, world / "two" / whole
    assert measured(again) == measured(once)
    for name, tensor in weights(once).items():
        assert torch.equal(weights(again)[name], tensor), name


def as_two_again(workers: Workers, folder: Path, home: str, config: Experiment) -> None:
    """What two workers do in a later process group: the end of a run of two and then one, and a run in a store."""
    resumed(workers, folder / "two of one of two", folder / "one of two", config, step=3)
    in_store(workers, home, config.changed({"train.checkpoint_async": True}))


@pytest.fixture(scope="module")
def home(
    world: Path, text_model: Path, text_data: Path, object_store: ObjectPath, tmp_path_factory: pytest.TempPathFactory
) -> ObjectPath:
    """A run's folder in a store, when `as_two_again` has ended."""
    config = experiment(text_model, text_data, world)
    each = config.changed({"train.checkpoint_every": 1})
    resumed(OneWorker(), world / "one of two", world / "two" / "hidden", each)
    home = object_store / tmp_path_factory.mktemp("store").name / "run"
    shared = config.changed(SHARDED)
    RunFolder(home).begin(shared.changed({"train.checkpoint_async": True}), ["test"])
    on_workers(2, as_two_again, world / "processes again", world, str(home), shared)
    return home


@pytest.mark.parametrize("name", ["one of two", "two of one", "two of one of two"])
def test_another_number_of_workers_resumes_it(name: str, world: Path, home: ObjectPath) -> None:
    """The formats differ, the run does not."""
    once, again = world / "one" / "hidden", world / name
    assert [record["step"] for record in measured(again)] == [1, 2, 3, 4]
    for expected, found in zip(measured(once), measured(again), strict=True):
        assert alike(found, expected)
    torch.testing.assert_close(weights(again), weights(once), rtol=1e-3, atol=2e-5)


def test_a_damaged_checkpoint_is_refused_by_every_worker(told: list[Told]) -> None:
    for gone, changed in (worker.refused for worker in told):
        assert "sharded/__1_0.distcp is missing" in gone
        assert "sharded/__1_0.distcp is not what was written" in changed
        assert "\n" not in gone + changed


def test_a_checkpoint_without_its_list_of_files_is_refused(
    world: Path, tmp_path: Path, text_model: Path, text_data: Path
) -> None:
    cut(OneWorker(), tmp_path / "run", world / "two" / "hidden", 2)
    (tmp_path / "run" / "checkpoints" / "step_000002" / FILES).unlink()
    with pytest.raises(StorageError, match=r"files\.json is missing or damaged"):
        train(experiment(text_model, text_data, world), RunFolder(tmp_path / "run"), OneWorker(), NullObserver())


def test_the_parts_of_a_checkpoint_merge_into_a_plain_folder(world: Path, tmp_path: Path) -> None:
    run = world / "two" / "hidden"
    whole = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "last" / "model").state_dict()
    source = tmp_path / "run"
    shutil.copytree(run, source, symlinks=True)
    shutil.rmtree(source / "checkpoints" / f"step_{STEPS:06d}" / "model")
    with pytest.raises(ConfigError, match="craft-ray merge"):
        model_folder(source)
    merge(source, tmp_path / "merged", lambda _: None)
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict().items():
        assert torch.equal(tensor, whole[name]), name


# -- four workers, other arithmetic, and a store


def in_store(workers: Workers, home: str, config: Experiment) -> None:
    """A run whose folder is in an object store, interrupted after its first checkpoint and resumed."""
    for steps in (2, None):
        folder = RunFolder(storage_path(home))
        with (
            mirrored_folder(folder, main=workers.rank == 0) as mirror,
            closing(training(config, mirror, workers, NullObserver())) as validations,
        ):
            for record in validations:
                if record["step"] == steps:
                    break
        workers.gather(None)  # nothing is pushed any more when the next one pulls


def as_four(workers: Workers, folder: Path, config: Experiment) -> None:
    hybrid = config.changed({"workers.num_workers": 4, "workers.sharding": "hybrid", "workers.shards": 2})
    trained_together(workers, hybrid, folder / "four" / "hybrid")
    short = {"train.precision": "bf16", "craft.anchor_cache_dir": str(folder / "bf16")}
    trained_together(workers, hybrid.changed(short), folder / "four" / "bf16")


def test_copies_of_shards_and_bfloat16(world: Path, text_model: Path, text_data: Path) -> None:
    """Two copies of the model, each shared between two workers; FSDP's own bfloat16 beside autocast."""
    config = experiment(text_model, text_data, world)
    short = config.changed({"train.precision": "bf16", "craft.anchor_cache_dir": str(world / "bf16")})
    build(short, lambda _: None)
    trained_together(OneWorker(), short, world / "one" / "bf16")
    on_workers(4, as_four, world / "processes of four", world, config)
    one, four = (weights(world / name) for name in ("one/hidden", "four/hybrid"))
    torch.testing.assert_close(four, one, rtol=1e-3, atol=2e-5)
    one, four = (weights(world / of / "bf16") for of in ("one", "four"))
    # Activations between the layers are rounded, too, so the untouched student is not quite its teacher: its first
    # retention gradient is not zero, and AdamW's first steps have the same length whatever the gradient's.
    assert apart(four, one, load_file(text_model / "model.safetensors")) < 0.6
    first_of_one, first_of_four = (measured(world / of / "bf16")[0] for of in ("one", "four"))
    assert first_of_four["train/loss"] == pytest.approx(first_of_one["train/loss"], rel=1e-3)
    assert first_of_four["craft/retention_loss"] < 1e-3
    parts = FileSystemReader(world / "four" / "bf16" / "checkpoints" / "step_000002" / "sharded").read_metadata()
    held = {part.properties.dtype for part in parts.state_dict_metadata.values() if hasattr(part, "properties")}
    assert held == {torch.float32}, "shards and moments, whatever is computed in"


def test_a_run_in_a_store_is_the_one_on_a_disk(world: Path, home: ObjectPath, tmp_path: Path) -> None:
    earlier = home / "checkpoints" / "step_000002" / "sharded"
    assert {file.name for file in earlier.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    copy_tree(home / "checkpoints" / f"step_{STEPS:06d}" / "model", tmp_path / "model")
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(tensor, weights(world / "two" / "hidden")[name]), name
