"""A process that dies counts as a failure; one that is lost with its node does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from craft_pipelines import anchors as stage
from craft_pipelines.anchors import MAX_DEATHS, build
from craft_pipelines.failures import LOST_PROCESS_ERRORS, node_was_lost
from craft_pipelines.teachers import ShardWriter
from craft_pipelines.train import is_loss, plan_run, run_on_trainer
from ray import ActorID
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    WorkerCrashedError,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from craft_ray.config import dump_config, parse_config
from craft_ray.errors import CraftError
from tests.support.caches import prompts, text_experiment

AN_ACTOR = ActorID(b"a" * 16)


def died(message: str) -> ActorDiedError:
    return ActorDiedError(ActorDiedErrorContext(actor_id=AN_ACTOR.binary(), error_message=message))


NODES = (
    died("The actor died because its node has died. Node Id: 1f"),
    ActorUnavailableError("RpcError: connection refused", AN_ACTOR.binary()),
    NodeDiedError("its node is dead"),
    ObjectLostError("ff", None, ""),
)
PROCESSES = (
    died("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"),
    WorkerCrashedError(),
    OutOfMemoryError("its node is short of memory"),
)


def test_a_process_lost_with_its_node_is_distinguished_from_one_that_dies_alone() -> None:
    assert all(isinstance(error, LOST_PROCESS_ERRORS) for error in (*NODES, *PROCESSES))
    assert [node_was_lost(error) for error in NODES] == [True] * len(NODES)
    assert [node_was_lost(error) for error in PROCESSES] == [False] * len(PROCESSES)


def test_the_errors_of_ray_train_for_a_lost_worker_are_recognized() -> None:
    assert all(is_loss(WorkerHealthCheckFailedError("its health", error)) for error in (*NODES, *PROCESSES))
    assert is_loss(WorkerHealthCheckTimeoutError("its health"))
    assert not is_loss(RuntimeError("Connection closed by peer"))
    assert not is_loss(WorkerHealthCheckFailedError("its health", CraftError("a mistake")))


class Shards:
    """In place of Ray Data: raises the errors one by one, then returns the shards."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    def __call__(self, config: Any, plan: Any, left: dict[str, range], actors: int, *_: Any) -> SimpleNamespace:
        def rows() -> Iterator[dict[str, Any]]:
            if self.errors:
                raise self.errors.pop(0)
            writer = ShardWriter(dump_config(config), plan.model_dump_json(), lambda *_: None)
            for name, rows in list(left.items()):
                yield {key: value[0] for key, value in writer(_batch(name, rows)).items()}

        return SimpleNamespace(iter_rows=rows)


def _batch(name: str, rows: range) -> dict[str, list[Any]]:
    return {"name": [name], "start": [rows.start], "stop": [rows.stop]}


@pytest.mark.parametrize(
    ("errors", "ends"),
    [
        ([*NODES] * 3, True),
        ([*PROCESSES], True),
        ([*PROCESSES, *NODES, PROCESSES[0]], False),
    ],
)
def test_a_build_gives_up_after_deaths_of_teachers_not_of_nodes(
    errors: list[Exception], ends: bool, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_dataset", Shards(list(errors)))
    monkeypatch.setattr(stage, "join", lambda: None)
    monkeypatch.setattr(stage, "check_resources", lambda *_: None)
    monkeypatch.setattr(stage, "check_shared", lambda *_: None)
    source = prompts(tmp_path / "anchors.jsonl", [3, 9, 1, 14] * 3)
    config = text_experiment(text_model, source, tmp_path, {"workers.num_workers": 1})
    assert len(PROCESSES) == MAX_DEATHS
    if ends:
        assert build(config, say=lambda _: None).rows_computed == 12
    else:
        with pytest.raises(CraftError, match=f"died {MAX_DEATHS + 1} times in a row"):
            build(config, say=lambda _: None)


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        ray.train.ControllerError(OutOfMemoryError("the node ran out of memory")),
    ],
)
def test_a_lost_controller_is_one_line_with_the_way_on(
    error: Exception, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(_: object) -> None:
        raise error

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    tree = {"model": {"path": str(text_model)}, "task": {"path": "task.jsonl"}, "train": {"steps": 1}}
    config = parse_config(tree | {"output_dir": str(tmp_path), "workers": {"num_workers": 0}}, "test")
    with pytest.raises(CraftError, match=rf"out of memory .*--resume {tmp_path}/run-hidden-seed0\) resumes") as caught:
        run_on_trainer([plan_run(config)])
    assert "\n" not in caught.value.message
