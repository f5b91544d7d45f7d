"""A cluster of two nodes on this machine: each stage runs on both, and has the same result if one is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from craft_pipelines.anchors import build
from safetensors.torch import load_file

from benchmarks.chaos import Stage, Training, Undisturbed, disturb, finish, stages, undisturbed
from benchmarks.nodes import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ENOUGH = {"cache": 6, "training": 12, "sweep": 3}
"""Shards, steps or validations after which something is lost: in the middle, and after a checkpoint."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster() as cluster:
        cluster.env["CRAFT_RAY_CACHE"] = str(tmp_path_factory.mktemp("expanded"))
        yield cluster


@pytest.fixture(scope="module")
def undisturbed_stages(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Stage, Undisturbed]]:
    """Each stage and its undisturbed result; training and sweep read the cache."""
    world = tmp_path_factory.mktemp("nodes")
    cache, training, sweep = stages(world)
    sweep.config = sweep.config.changed({"sweep.max_failures": 0})  # a trial lost with its node is not counted
    return {
        cache.name: (cache, built_here(cache, world)),
        training.name: (training, undisturbed(training, world / "training", cluster)),
        sweep.name: (sweep, undisturbed(sweep, world / "sweep", cluster)),
    }


def built_here(stage: Stage, world: Path) -> Undisturbed:
    """The cache built in this process: who builds it makes no difference."""
    started = time.monotonic()
    build(stage.config.changed({"workers.num_workers": 0}), say=lambda _: None)
    seconds = time.monotonic() - started
    return Undisturbed(world, stage.result(world), seconds, 0.0, stage.progress(world))


def spread(stage: Stage, home: Path, cluster: Cluster) -> Callable[[], bool]:
    """Whether a stage is in the middle of its work, with workers on each node."""
    return lambda: stage.progress(home) >= ENOUGH[stage.name] and all(stage.workers(cluster))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENOUGH)
def test_a_stage_on_two_nodes_has_the_same_result_if_one_is_lost(
    name: str, undisturbed_stages: dict[str, tuple[Stage, Undisturbed]], cluster: Cluster, tmp_path: Path
) -> None:
    stage, reference = undisturbed_stages[name]
    kill = disturb(stage, "node", tmp_path, cluster, reference, spread(stage, tmp_path, cluster), random.Random(0))
    assert kill is not None, "it ended without having run on both nodes"
    assert kill.same, kill.said
    if name == "training":
        assert any(f"resuming after step {step}" in kill.said for step in range(10, 40, 5)), kill.said


@pytest.mark.slow
def test_training_continues_with_the_remaining_workers(
    undisturbed_stages: dict[str, tuple[Stage, Undisturbed]], cluster: Cluster, tmp_path: Path
) -> None:
    fixed, reference = undisturbed_stages["training"]
    assert isinstance(fixed, Training)
    elastic = Training(fixed.config.changed({"workers.num_workers": [1, 2]}))
    moment = spread(elastic, tmp_path, cluster)
    cluster.wait_until_idle()
    driver = elastic.start(tmp_path, cluster)
    while not moment():
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    cluster.lose(cluster.nodes[0])
    said = finish(driver)
    cluster.add()
    before, _, after = said.partition("2 worker(s)")
    assert "worker(s)" not in before
    assert "1 worker(s)" in after
    assert int(after.split("resuming after step ")[1].split()[0]) >= 10

    log, expected = elastic.result(tmp_path)[1], reference.result[1]
    for ours, theirs in zip(log, expected, strict=True):
        assert ours["craft/conflict"] == theirs["craft/conflict"]
        for key in ("train/loss", "train/grad_norm", "craft/retention_loss", "craft/lambda"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-2, abs=1e-5), key
    found, wanted = (load_file(elastic.weights(home)) for home in (tmp_path, reference.home))
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-2, atol=2e-3)


@pytest.mark.cluster
def test_workers_lost_too_often_end_a_run_with_one_line_that_says_how_to_resume(
    undisturbed_stages: dict[str, tuple[Stage, Undisturbed]], cluster: Cluster, tmp_path: Path
) -> None:
    fixed, reference = undisturbed_stages["training"]
    stage = Training(fixed.config.changed({"workers.max_failures": 0}))
    driver = stage.start(tmp_path, cluster)
    moment = spread(stage, tmp_path, cluster)
    while not moment():
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    stage.workers(cluster)[1][0].kill()
    said, _ = driver.communicate()
    assert driver.returncode == 1, said
    last = said.splitlines()[-1]
    assert last.startswith("craft-ray: a worker was lost more than workers.max_failures=0 times")
    assert f"--resume {stage.run(tmp_path).path}" in last
    assert "Traceback" not in said

    finish(stage.start(tmp_path, cluster))
    assert stage.result(tmp_path) == reference.result
