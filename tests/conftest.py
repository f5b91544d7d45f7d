"""The two example models and their data, built once for all tests; the Hub is unreachable."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Read when transformers and datasets are imported, so they are set before both.
_CACHE = tempfile.TemporaryDirectory(prefix="craft-ray-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = f"{_CACHE.name}/datasets"
os.environ["HF_MODULES_CACHE"] = f"{_CACHE.name}/modules"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when torch is imported. Tests run in several processes at once: more threads than processors wait for each other,
# and the tests of models took 2.7 times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

if TYPE_CHECKING:
    from craft_ray.storage.paths import ObjectPath
    from tests.support.clusters import Cluster
    from tests.support.commands import Command
    from tests.support.experiments import Digits


def pytest_configure() -> None:
    """Test files import everything: a third faster without the garbage collector."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()  # imported objects stay, and no collection during a test needs to scan them


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """The tiny PaliGemma and its data."""
    from craft_ray.examples import digits as example
    from tests.support.experiments import Digits

    folder = tmp_path_factory.mktemp("digits")
    example.build_model(folder / "model")
    example.write_data(folder / "data")
    return Digits(folder / "model", folder / "data")


@pytest.fixture(scope="module")
def cached(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an anchor cache of the digits model, built without an adapter. A test file may write into it."""
    from craft_pipelines.anchors import build

    folder = tmp_path_factory.mktemp("cached")
    build(digits.experiment(folder), say=lambda _: None)
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama and its byte tokenizer. Shared: do not write into it."""
    from craft_ray.examples import text

    folder = tmp_path_factory.mktemp("text") / "model"
    text.build_model(folder)
    return folder


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with {old,new}_{train,val,test}.parquet and anchors.parquet. Shared: do not write into it."""
    from craft_ray.examples import text

    folder = tmp_path_factory.mktemp("text") / "data"
    text.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectPath]:
    """A bucket in a real S3 endpoint on loopback, which the environment points to."""
    from tests.support.stores import running_store

    with running_store() as bucket:
        yield bucket


@pytest.fixture(autouse=True)
def own_expansions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expand caches below this test's folder, so that no test uses what another one expanded."""
    monkeypatch.setenv("CRAFT_RAY_CACHE", str(tmp_path / "expanded"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`craft-ray ARGUMENTS...` -> exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        from craft_pipelines import cli

        monkeypatch.setattr(sys, "argv", ["craft-ray", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def token_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node with two CPUs that requires a token."""
    from tests.support.clusters import cluster

    with cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found
