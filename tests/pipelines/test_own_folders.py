"""Commands work whatever folders a user has: also folders named like our packages, or like a library."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from craft_ray.config import dump_config
from craft_ray.run.folder import RunFolder
from tests.support.clusters import BIN, Cluster
from tests.support.experiments import Digits

ROOT = Path(__file__).resolve().parents[2]
OWN = ("pipelines", "search_spaces", "tests", "cluster", "data", "models", "smoke")
"""Packages that a project may have. Most are also folders of our repository; the last is a shipped space."""
LIBRARIES = ("datasets", "statistics", "yaml")
"""Modules that our processes import, from other packages and from Python itself."""


@pytest.fixture
def project(tmp_path: Path, digits: Digits) -> Path:
    """A working directory with an experiment, and packages that must not be imported."""
    folder = tmp_path / "project"
    shadow(folder, OWN)
    changes = {
        "train.steps": 2, "craft.epsilon_start": 10.0, "anchors.source.limit": 16,
        "validation.every": 2, "objective.minimize": "train/loss", "sweep.samples": 1, "sweep.scheduler": "none",
    }  # fmt: skip
    (folder / "run.yaml").write_text(dump_config(digits.experiment(tmp_path, changes)))
    return folder


def shadow(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise AssertionError('{name} of the working directory')\n")


def craft_ray(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """The output of `craft-ray ARGUMENTS` in a folder; it must succeed."""
    return output(folder, "craft-ray", *arguments, environment=environment)


def output(folder: Path, command: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [BIN / command, *arguments], cwd=folder, env=dict(os.environ) if environment is None else environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def finished(tmp_path: Path, name: str) -> bool:
    return RunFolder(tmp_path / "runs" / f"{name}-hidden-seed0").finished() is not None


@pytest.mark.slow
def test_in_one_process(project: Path, tmp_path: Path) -> None:
    shadow(project, LIBRARIES)
    assert "16 anchors" in craft_ray(project, "anchors", "build", "run.yaml")
    craft_ray(project, "train", "run.yaml")
    assert finished(tmp_path, "digits")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_processes_of_ray(project: Path, tmp_path: Path, token_cluster: Cluster) -> None:
    """On a running cluster, on one started for the command, and as a job with a copy of the project, whether it is
    submitted by Ray's own command or by ours."""
    joined = token_cluster.environment | {"RAY_ADDRESS": token_cluster.address}
    one = "workers.num_workers=1"
    user, at = token_cluster.environment, ("submit", "--address", token_cluster.dashboard)
    by_ray = ("job", *at, "--working-dir", ".", "--", "craft-ray")
    output(project, "ray", *by_ray, "anchors", "build", "run.yaml", one, environment=user)
    craft_ray(project, *at, "--", "craft-ray", "train", "run.yaml", one, "name=job", environment=user)
    assert finished(tmp_path, "job")

    shadow(project, LIBRARIES)  # Ray makes a job import from its working directory in any case
    cache = f"craft.anchor_cache_dir={tmp_path / 'again'}"
    assert "16 anchors" in craft_ray(project, "anchors", "build", "run.yaml", one, cache, environment=joined)
    craft_ray(project, "train", "run.yaml", one, "name=one", environment=joined)
    assert finished(tmp_path, "one")
    out = str(tmp_path / "sweep")
    swept = craft_ray(project, "sweep", "run.yaml", "--space", "smoke", "--out", out, environment=joined)
    assert "best: trial 0" in swept
    craft_ray(project, "train", "run.yaml", "workers.num_workers=2", "name=two")
    assert finished(tmp_path, "two")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; built with the installed packages if they suffice, otherwise as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *here, "-w", folder, ROOT], check=True, timeout=250
    )
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_installs_no_name_that_a_project_may_use(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    version = wheel.name.split("-")[1]
    assert {name.partition("/")[0] for name in names} == {
        "craft_ray", "craft_pipelines", f"craft_ray-{version}.dist-info"
    }  # fmt: skip
    for folder in ("search_spaces", "pipelines/configs"):
        shipped = {file.name for file in (ROOT / folder).glob("*.yaml")}
        assert shipped
        assert {f"craft_ray/shipped/{folder}/{name}" for name in shipped} <= set(names)


def test_files_in_a_wheel_are_found_after_installation(wheel: Path, tmp_path: Path) -> None:
    target, project = tmp_path / "installed", tmp_path / "project"
    with zipfile.ZipFile(wheel) as content:  # a wheel without data files is installed by unpacking it
        content.extractall(target)
    shadow(project, OWN)
    program = (
        "import craft_pipelines.cli; from craft_ray.shipped import shipped\n"
        "print(craft_pipelines.__file__, shipped('search_spaces'), shipped('pipelines/configs'), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=project, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(target)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pipelines, spaces, configs = map(Path, done.stdout.splitlines())
    assert pipelines == target / "craft_pipelines" / "__init__.py"
    assert spaces == target / "craft_ray" / "shipped" / "search_spaces"
    assert configs == target / "craft_ray" / "shipped" / "pipelines" / "configs"
    assert (configs / "demo_digits.yaml").is_file()
