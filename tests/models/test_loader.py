"""Samples preprocessed in other processes: what is sent, what comes back, and what happens if one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from craft_pipelines.anchors import build

from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.reader import open_anchors
from craft_ray.config import AdapterConfig, ModelConfig
from craft_ray.data.sample import Sample
from craft_ray.data.task import open_task
from craft_ray.errors import ConfigError, CraftError, DataError
from craft_ray.models import load_model
from craft_ray.models.adapting import attach
from craft_ray.models.base import Features, Model
from craft_ray.models.features import FeatureCache
from craft_ray.models.loader import Loader
from craft_ray.models.weightless import received, without_weights
from craft_ray.retention.inputs import AnchorInputs
from craft_ray.run.task_data import TaskSamples
from tests.support.experiments import Digits
from tests.support.runs import trained


def equal(ours: Features, theirs: Features) -> bool:
    pairs = [(ours.tokens, theirs.tokens), (ours.images, theirs.images)]
    same = all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)
    return same and ours.layout == theirs.layout


@pytest.fixture(scope="module")
def model(digits: Digits) -> Model:
    return load_model(ModelConfig(kind="vision_language", path=str(digits.model)), "fp32")


def weights_of(model: Model) -> int:
    return sum(parameter.nbytes for parameter in model.module.parameters())


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_without_weights_preprocesses_as_before(adapted: bool, text_model: Path) -> None:
    config = ModelConfig(kind="causal_lm", path=str(text_model))
    whole = load_model(config, "fp32")
    if adapted:
        attach(whole, AdapterConfig(r=2), config, "base")
    before = whole.weights_fingerprint()
    sent = without_weights(whole)
    alone = received(sent)
    sample = Sample("a", "What is left?", response="Nothing.")
    assert len(sent) < weights_of(whole) / 4
    assert not list(alone.module.parameters())
    assert equal(alone.preprocess_task(sample), whole.preprocess_task(sample))
    assert alone.sample_fingerprint() == whole.sample_fingerprint()
    assert whole.weights_fingerprint() == before


def test_what_cannot_be_sent_is_one_line(model: Model) -> None:
    model.lock = lambda: None  # type: ignore[attr-defined]
    try:
        with pytest.raises(ConfigError, match=r"cannot be sent .*train\.loader_workers=0"):
            without_weights(model)
    finally:
        del model.lock  # type: ignore[attr-defined]


@pytest.fixture
def loader() -> Iterator[Loader]:
    loader = Loader(1)
    yield loader
    loader.close()


def test_an_error_and_a_death_in_a_loader(digits: Digits, tmp_path: Path, model: Model, loader: Loader) -> None:
    config = digits.experiment(tmp_path)
    make = TaskSamples(config.task, model, open_task(config.task))
    source = FeatureCache().with_loaders(0).source(make, "task")
    for found, expected in zip(loader.map(make, [5, 2, 5]), source.batch([5, 2, 5]), strict=True):
        assert equal(found, expected)
    with pytest.raises(DataError, match="has no image"):
        loader.map(Broken(model), [1])
    for process in psutil.Process().children(recursive=True):
        if "spawn_main" in " ".join(process.cmdline()):
            process.kill()
    with pytest.raises(CraftError, match=r"train\.loader_workers=1 processes .* died"):
        loader.map(make, [1])


class Broken:
    """Prepares a prompt without the image that the model needs."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, _: int) -> Features:
        return self.model.preprocess(Sample("b", "what is it?"))


@pytest.mark.slow
def test_a_run_with_loaders_is_the_same_run(digits: Digits, tmp_path: Path) -> None:
    config = digits.experiment(tmp_path, {"anchors.positions": ["suffix"]})
    build(config, say=lambda _: None)
    runs = [trained(config.changed({"train.loader_workers": n}), tmp_path / str(n)) for n in (0, 1)]
    alone, beside = ([{k: v for k, v in r.items() if "perf/" not in k} for r in run.read_metrics()] for run in runs)
    assert alone == beside
    assert not [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_anchors_are_loaded_by_other_processes_too(digits: Digits, tmp_path: Path, model: Model) -> None:
    config = digits.experiment(tmp_path)
    build(config, say=lambda _: None)
    folder = tmp_path / "anchors"
    features = FeatureCache().with_loaders(1)
    anchors = open_anchors(folder, read_manifest(folder))
    batches = [AnchorInputs(model, anchors, True, cache).batch([3, 1]) for cache in (features, None)]
    features.close()
    assert batches[0].inputs.keys() == batches[1].inputs.keys()
    assert all(torch.equal(batches[0].inputs[name], tensor) for name, tensor in batches[1].inputs.items())


RUN = """
import time

import psutil

from craft_ray.models.loader import Loader

if __name__ == "__main__":
    loader = Loader(1)
    loader._pool.submit(time.sleep, 0).result()
    print(*[process.pid for process in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_loaders_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    run = subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    children = [int(pid) for pid in run.stdout.readline().split()]
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children
    assert not any(psutil.pid_exists(pid) for pid in children)
