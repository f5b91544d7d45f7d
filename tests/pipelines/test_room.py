"""How many runs a cluster has room for: by processors and by memory, on made-up nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from craft_pipelines import room as module
from craft_pipelines.nodes import Node
from craft_pipelines.room import PROCESS, room, worker_memory
from craft_pipelines.session import check_resources, check_total
from safetensors.torch import save_file

from craft_ray.config import Experiment, parse_config
from craft_ray.errors import ConfigError
from craft_ray.init.model import stored_parameters
from craft_ray.storage.paths import ObjectPath, copy_tree
from tests.support.experiments import Digits

GIB = 2**30


@pytest.fixture
def config(digits: Digits, tmp_path: Path) -> Experiment:
    return digits.experiment(tmp_path, {"workers.num_workers": 1})


def cluster(monkeypatch: pytest.MonkeyPatch, *nodes: tuple[float, float]) -> None:
    """Nodes with so many processors and GiB of memory."""
    alive = [Node(str(i), "", {"CPU": cpus, "memory": gib * GIB}) for i, (cpus, gib) in enumerate(nodes)]
    ray_nodes = [{"Alive": True, "Resources": node.resources} for node in alive]
    monkeypatch.setattr(module, "alive_nodes", lambda: alive)
    monkeypatch.setattr("craft_pipelines.session.ray.nodes", lambda: ray_nodes)


def takes(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(module, "worker_memory", lambda _: int(gib * GIB))


def asked(config: Experiment, most: int | None = None) -> tuple[int, int | None, str]:
    lines: list[str] = []
    found = room(config, "run", most, lines.append)
    return found.count, found.memory, " ".join(lines)


def test_memory_decides_where_it_is_less_than_the_processors(
    config: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(monkeypatch, (8, 9), (2, 30))
    takes(monkeypatch, 4.1)
    count, memory, line = asked(config)
    assert count == 2 + 2, "two in the first node's memory, two on the second's processors"
    assert memory == int(4.1 * GIB)
    assert line == (
        "up to 4 run(s) at a time: a worker takes about 4.1 GiB of memory, a node has up to 30.0 GiB for them (there "
        "are processors for 10)"
    )
    takes(monkeypatch, 0.5)
    assert asked(config)[0] == 10
    assert asked(config, most=3)[0] == 3
    assert "processors for" not in asked(config, most=3)[2]
    two = config.changed({"workers.num_workers": 2})
    takes(monkeypatch, 4.1)
    assert asked(two)[0] == 2, "of two workers each"


def test_an_estimate_refuses_nothing(config: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, (4, 3))
    takes(monkeypatch, 50)
    assert asked(config)[:2] == (1, 3 * GIB), "one runs, with all that the node has"


def test_a_request_of_the_users_own_is_kept(config: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, (4, 8))
    own = config.changed({"workers.resources_per_worker": {"memory": 4.0 * GIB}})
    assert asked(own) == (2, None, "up to 2 run(s) at a time")


def test_too_few_processors_are_refused_and_an_elastic_run_takes_what_is_there(
    config: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(monkeypatch, (2, 8))
    with pytest.raises(ConfigError, match=r"a run takes 4 worker\(s\) of 1 CPU, and the cluster holds 2 of them"):
        asked(config.changed({"workers.num_workers": 4}))
    elastic = {"workers.num_workers": [1, 4], "train.batch_size": 12, "craft.anchor_batch_size": 12}
    assert asked(config.changed(elastic))[0] == 1


def test_the_estimate_grows_with_what_is_trained_and_with_a_pass(
    config: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worker_memory(config)
    assert PROCESS < whole < PROCESS + 200 * 2**20, "a tiny model"
    passes = worker_memory(config.changed({"train.accumulate": 8})) - PROCESS
    assert passes < whole - PROCESS
    adapter = worker_memory(config.changed({"adapter": {"r": 4}}))
    parameters = module.look_at_model(config.model.path).parameters
    assert whole - adapter == 20 * parameters
    gpu = worker_memory(config.changed({"workers.use_gpu": True}))
    assert gpu == PROCESS + 4 * parameters


def test_streamed_task_data_are_estimated_by_their_first_samples(text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = pa.table({"prompt": [*"abc", "long " * 9], "response": list("abcd")})
    pq.write_table(rows, tmp_path / "data" / "train.parquet")
    tree = {
        "name": "streamed",
        "model": {"path": str(text_model), "max_length": 64},
        "task": {"path": str(tmp_path / "data"), "format": "dataset", "columns": {"response": "response"}},
        "craft": {"enabled": False},
        "train": {"steps": 2, "batch_size": 8},
    }
    config = parse_config(tree, "test")
    assert worker_memory(config.changed({"task.streaming": True})) == worker_memory(config)


def test_the_parameters_of_a_policy_are_read_from_its_files(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.zeros(())}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert stored_parameters(tmp_path) == 15 + 7 + 1


def test_of_a_model_in_an_object_store_no_weights_are_fetched(
    config: Experiment, object_store: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRAFT_RAY_CACHE", str(tmp_path / "cache"))
    stored = object_store / "room"
    copy_tree(Path(config.model.path), stored / "model")
    assert worker_memory(config.changed({"model.path": str(stored / "model")})) == worker_memory(config)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/config.json").write_text('{"type": "act"}')
    save_file({"weight": torch.zeros(3, 5)}, tmp_path / "policy/model.safetensors")
    copy_tree(tmp_path / "policy", stored / "policy")
    assert module.look_at_model(str(stored / "policy")).parameters == 15
    fetched = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "config.json" in fetched
    assert "model.safetensors" not in fetched


def test_what_cannot_be_estimated_refuses_nothing(
    config: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An adapter as the model, code of its own, a revision that is not at hand: training loads them."""
    cluster(monkeypatch, (4, 8))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    count, memory, line = asked(config.changed({"model.path": str(tmp_path / "adapter")}))
    assert (count, memory) == (4, None)
    assert line.startswith("up to 4 run(s) at a time; the memory that one takes is not estimated (model.path ")


def test_a_process_has_to_fit_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would wait for ever: processors and GPUs of several nodes do not add up for it."""
    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0}]
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    monkeypatch.setattr("craft_pipelines.session.ray.nodes", lambda: [{"Alive": True, "Resources": n} for n in nodes])
    monkeypatch.setattr("craft_pipelines.session.ray.cluster_resources", lambda: total)

    def lacking(count: int, cpus: float, gpus: float = 0.0) -> str | None:
        return check_resources(count, {"CPU": cpus, "GPU": gpus}, "anchors.actors")

    for fitting in ((2, 8.0, 1.0), (5, 4.0), (4, 2.0, 0.5), (0, 10.0)):
        assert lacking(*fitting) is None
    assert lacking(1, 1, 2) == (
        "anchors.actors need 1 x (1 CPU, 2 GPU), each on one node, and the nodes hold 0 of them (they have 2 x (8 CPU, "
        "1 GPU), 1 x (4 CPU)): request less for each, or join a cluster with larger nodes (RAY_ADDRESS)"
    )
    assert "3 x (6 CPU), each on one node, and the nodes hold 2 of them" in str(lacking(3, 6))
    assert "need 3 x 8 CPU, the cluster has 20" in str(lacking(3, 8))
    assert check_total(1, {"CPU": 20}, "anchors.actors and anchors.readers") is None
