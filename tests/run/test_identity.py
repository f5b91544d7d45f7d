"""A run is the config and the task data that it began with: how it is recorded, compared, and locked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from craft_pipelines.compare import compare
from craft_pipelines.train import plan_run, resume_run, train_run
from safetensors.torch import load_file, save_file

from craft_ray import interruption
from craft_ray.config import Experiment, deciding_difference, dump_config, parse_config
from craft_ray.errors import ConfigError, DataError, Interrupted
from craft_ray.models.fingerprint import files_fingerprint
from craft_ray.run import cadence
from craft_ray.run.folder import RunFolder
from craft_ray.run.identity import RECORD
from craft_ray.run.locks import only_command, only_process, remove_unstarted
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train
from craft_ray.storage.last import last_checkpoint
from craft_ray.workers import OneWorker
from tests.support.runs import weights


def write_task(path: Path, answer: str = "") -> None:
    rows = [{"prompt": f"Q{row}", "response": answer or str(row)} for row in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(text_model: Path, tmp_path: Path) -> Experiment:
    write_task(tmp_path / "task.jsonl")
    columns = {"prompt": "prompt", "response": "response"}
    tree = {
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(text_model), "max_length": 64},
        "task": {"path": str(tmp_path / "task.jsonl"), "columns": columns},
        "craft": {"enabled": False},
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "learning_rate": 0.001},
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test")


@pytest.fixture
def begun(config: Experiment) -> RunFolder:
    """A run that was lost after three of its four steps."""
    folder = plan_run(config).folder
    Run(config, folder, OneWorker(), NullObserver()).loop(until=3)
    return folder


def test_a_config_that_was_edited_is_refused_with_both_values(config: Experiment, begun: RunFolder) -> None:
    (begun.path / "config.yaml").write_text(dump_config(config.changed({"train.learning_rate": 0.002})))
    said = r"started with another config \(train\.learning_rate was 0\.001, is 0\.002\)"
    with pytest.raises(ConfigError, match=said):
        resume_run(begun.path)
    with pytest.raises(ConfigError, match=said):
        train(config.changed({"train.learning_rate": 0.002}), begun, OneWorker(), NullObserver())


def test_task_data_that_were_exchanged_are_refused(config: Experiment, begun: RunFolder) -> None:
    write_task(Path(config.task.path), "banana")
    with pytest.raises(ConfigError, match=r"task\.path .*task\.jsonl is not what it was when the run .* began"):
        train(config, begun, OneWorker(), NullObserver())
    moved = Path(config.task.path).with_name("moved.jsonl")
    write_task(moved)
    config = config.changed({"task.path": str(moved)})
    train(config, begun, OneWorker(), NullObserver())
    assert begun.finished() is not None


def other_weights(folder: Path) -> None:
    """As large as before, and different in one place of many."""
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    save_file(state, file, metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}', 1))


@pytest.fixture
def own_model(config: Experiment, tmp_path: Path) -> Experiment:
    """The same run from a copy of the model."""
    folder = shutil.copytree(config.model.path, tmp_path / "model")
    return config.changed({"model.path": str(folder)})


@pytest.mark.parametrize(
    ("exchange", "until", "said"),
    [
        (other_weights, 3, "weight files"),
        (other_weights, 1, "weights"),  # lost before its first checkpoint: the folder's weights are loaded again
        (other_tokenizer, 3, "tokenizer, processor and limits"),
    ],
)
def test_a_model_that_was_exchanged_is_refused(
    exchange: Callable[[Path], None], until: int, said: str, own_model: Experiment
) -> None:
    """Without a cache or held-out data, nothing else knows which model it was."""
    run = plan_run(own_model)
    Run(own_model, run.folder, OneWorker(), NullObserver()).loop(until=until)
    folder, kept = Path(own_model.model.path), Path(own_model.output_dir).parent / "kept"
    shutil.copytree(folder, kept)
    exchange(folder)
    recorded = (run.folder.path / RECORD).read_text()
    with pytest.raises(ConfigError, match=rf"model\.path .*model is not what it was .*: its {said} had the fing") as e:
        train(own_model, run.folder, OneWorker(), NullObserver())
    assert "\n" not in e.value.message
    assert (run.folder.path / RECORD).read_text() == recorded
    shutil.rmtree(folder)
    kept.rename(folder)
    train(own_model, run.folder, OneWorker(), NullObserver())
    assert json.loads((run.folder.path / RECORD).read_text())["model"] == json.loads(recorded)["model"]


def test_what_an_earlier_version_did_not_record_of_a_model_is_not_compared(own_model: Experiment) -> None:
    run = plan_run(own_model)
    Run(own_model, run.folder, OneWorker(), NullObserver()).loop(until=3)
    path = run.folder.path / RECORD
    tree = json.loads(path.read_text())
    weights = tree.pop("model")["weights"]
    path.write_text(json.dumps(tree))
    other_weights(Path(own_model.model.path))
    train(own_model, run.folder, OneWorker(), NullObserver())
    model = json.loads(path.read_text())["model"]
    assert model.pop("weights") is None, "they were not loaded"
    assert weights
    assert all(model.values())


def test_a_changed_part_of_a_weight_file_is_another_one(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    assert files_fingerprint(tmp_path) is None
    numbers = torch.arange(4_000_000, dtype=torch.float32)
    found = []
    for state in ({"a": numbers}, {"a": numbers * 1.001}, {"b": numbers}):
        save_file(state, file)
        (tmp_path / "README.md").write_text(str(len(found)))  # says nothing about weights
        found.append(files_fingerprint(tmp_path))
    save_file({"a": numbers}, file)
    assert files_fingerprint(tmp_path) == found[0]
    assert len(set(found)) == 3


def test_what_decides_no_number_may_change(config: Experiment, begun: RunFolder, tmp_path: Path) -> None:
    run = resume_run(begun.path, changes={"train.checkpoint_every": 3, "train.log_every": 4, "train.prefetch": 1})
    train_run(run)
    assert begun.config().train.checkpoint_every == 3
    assert {path.name for path in begun.checkpoints.glob("step_*")} == {"step_000003", "step_000004"}
    whole = RunFolder(tmp_path / "whole")
    train(config, whole, OneWorker(), NullObserver())
    ours, theirs = weights(begun), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "decides"),
    [
        ({"train.checkpoint_minutes": 1}, False),
        ({"train.keep_checkpoints": 1}, False),
        ({"train.check_minutes": 0}, False),
        ({"workers.num_workers": 2}, False),
        ({"tracking.mlflow": "http://tracking"}, False),
        ({"compare.seeds": [1]}, False),
        ({"objective": {"maximize": "new/score"}}, False),
        ({"output_dir": "/elsewhere"}, False),
        ({"task.path": "/elsewhere/task.jsonl"}, False),
        ({"craft.anchor_cache_dir": "/elsewhere/cache"}, False),
        ({"anchors": {"source": {"path": "/elsewhere/old.jsonl"}, "actors": 4}}, True),
        ({"model.path": "/elsewhere/model"}, True),
        ({"seed": 1}, True),
        ({"train.steps": 5}, True),
        ({"train.accumulate": 2}, True),
        ({"train.precision": "bf16"}, True),
        ({"task.limit": 3}, True),
        ({"model.max_length": 99}, True),
        ({"craft.lambda_lr": 0.5}, True),
    ],
)
def test_what_decides_a_number(changes: dict[str, Any], decides: bool, config: Experiment) -> None:
    difference = deciding_difference(config, config.changed(changes))
    assert (difference is not None) == decides
    assert difference is None or difference.startswith(f"{next(iter(changes))} was ")


def test_a_run_of_an_earlier_version_resumes_and_is_recorded(config: Experiment, begun: RunFolder) -> None:
    (begun.path / RECORD).unlink()
    with pytest.raises(ConfigError, match=r"seed was 0, is 1"):
        resume_run(begun.path, config.changed({"seed": 1}))
    train_run(resume_run(begun.path))
    assert json.loads((begun.path / RECORD).read_text())["config"]["train"]["steps"] == 4


def test_before_its_first_step_a_run_may_become_another(config: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    Run(config, folder, OneWorker(), NullObserver())
    other = config.changed({"seed": 3})
    Run(other, folder, OneWorker(), NullObserver())
    assert folder.config() == other


def test_a_second_start_is_refused_and_leaves_everything_as_it_is(config: Experiment) -> None:
    run = plan_run(config)
    with only_command(run.folder):
        Run(config, run.folder, OneWorker(), NullObserver())
        other = config.changed({"train.learning_rate": 0.5})
        with pytest.raises(ConfigError, match="another process is training the run"):
            train_run(plan_run(other))
        assert run.folder.config() == config
    train_run(run)
    assert run.folder.config() == config


def test_a_worker_of_a_lost_command_keeps_its_folder(config: Experiment, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_config(config)
    with only_process(folder, OneWorker()), pytest.MonkeyPatch.context() as patch:
        patch.setattr("craft_ray.run.locks.REMOVAL_WAIT_S", 0)
        remove_unstarted(folder)
        assert folder.config() == config
    remove_unstarted(folder)
    assert not folder.path.exists()


def test_a_comparison_takes_over_only_the_same_finished_runs(config: Experiment, tmp_path: Path) -> None:
    config = config.changed({"train.steps": 1})
    compare(config, ["baseline"], [0], tmp_path / "out")
    compare(config.changed({"train.log_every": 5}), ["baseline"], [0], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"train\.learning_rate was 0\.001, is 0\.003"):
        compare(config.changed({"train.learning_rate": 0.003}), ["baseline"], [0], tmp_path / "out")
    write_task(Path(config.task.path), "banana")
    with pytest.raises(ConfigError, match=r"task\.path .* is not what it was"):
        compare(config, ["baseline"], [0], tmp_path / "out")


def test_a_comparison_takes_over_no_run_of_another_model(own_model: Experiment, tmp_path: Path) -> None:
    config = own_model.changed({"train.steps": 1})
    compare(config, ["baseline"], [0], tmp_path / "out")
    other_weights(Path(config.model.path))
    with pytest.raises(ConfigError, match=r"model\.path .* is not what it was when the run .*: its weight files had"):
        compare(config, ["baseline"], [0], tmp_path / "out")


# -- interruptions


def interrupted_after(step: int, config: Experiment, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a run says that is interrupted after a step."""
    run = plan_run(config)

    def trains(_: object) -> None:
        if step:
            Run(config, run.folder, OneWorker(), NullObserver()).loop(until=step)
        raise KeyboardInterrupt

    monkeypatch.setattr("craft_pipelines.train.run_on_trainer", trains)
    with pytest.raises(Interrupted) as caught:
        train_run(run)
    return caught.value.message


@pytest.mark.parametrize(
    ("changes", "step", "said"),
    [
        ({}, 0, "before the first step: nothing was kept"),
        (
            {"train.checkpoint_every": 0},
            1,
            "after step 1, before the first checkpoint: nothing was kept",
        ),
        ({}, 3, "after step 3: continue from the checkpoint at step 2 with craft-ray train --resume "),
        ({"train.checkpoint_every": 0, "train.checkpoint_minutes": 1e-9}, 3, "continue from the checkpoint at step 3"),
    ],
)
def test_an_interrupted_run_says_what_was_kept(
    changes: dict[str, Any], step: int, said: str, config: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cadence, "SHARE", 1e9)
    assert said in interrupted_after(step, config.changed(changes), monkeypatch)


def test_a_run_resumes_from_a_checkpoint_by_time_bit_for_bit(
    config: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cadence, "SHARE", 1e9)
    config = config.changed({"train.checkpoint_every": 0})
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    train(config, whole, OneWorker(), NullObserver())
    Run(config.changed({"train.checkpoint_minutes": 1e-9}), cut, OneWorker(), NullObserver()).loop(until=3)
    last = last_checkpoint(cut.checkpoints)
    assert last is not None
    assert last.name == "step_000003"
    train(config, cut, OneWorker(), NullObserver())
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_swallowed_signal_ends_a_run_at_its_next_step(
    config: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(config, RunFolder(tmp_path / "run"), OneWorker(), NullObserver())
    run.loop(until=1)
    monkeypatch.setattr(interruption, "_signalled", True)
    with pytest.raises(Interrupted):
        run.loop(until=2)
    assert run.step == 1
    assert not issubclass(Interrupted, Exception)


def test_a_perplexity_beyond_every_number_is_one_line(config: Experiment, tmp_path: Path) -> None:
    data = {"path": config.task.path, "columns": {"prompt": "prompt", "response": "response"}}
    run = Run(
        config.changed({"evaluation.new": {"metric": "perplexity", "data": data}}),
        RunFolder(tmp_path / "run"), OneWorker(), NullObserver(),
    )  # fmt: skip
    with torch.no_grad():
        run.model.module.get_input_embeddings().weight.mul_(1e4)  # and of the head, which shares them
    with pytest.raises(DataError, match=r"task\.jsonl: the perplexity of the responses is beyond every number"):
        run.held_out.score_teacher()
