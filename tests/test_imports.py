"""What an import costs and what it must not bring: Ray stays in `pipelines`, the configuration needs no torch."""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import craft_ray

LEROBOT = ("craft_ray.lerobot", "craft_ray.examples.robot")
"""The only modules that import LeRobot; nothing else imports them but inside a function."""

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(craft_ray.__path__, "craft_ray.")
    if not module.name.endswith("__main__") and not module.name.startswith(LEROBOT)
)


def loaded_by(*names: str) -> set[str]:
    """Top-level packages in a fresh interpreter that has imported these modules."""
    program = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_method_does_not_know_ray() -> None:
    assert {"craft_ray.config", "craft_ray.method.step", "craft_ray.models", "craft_ray.run.training"} <= set(MODULES)
    loaded = loaded_by(*MODULES)
    assert "torch" in loaded
    assert not loaded & {"ray", "lerobot", "pipelines"}


@pytest.mark.parametrize("module", ["craft_ray", "craft_ray.config", "craft_ray.errors"])
def test_a_mistake_in_the_configuration_is_told_without_torch(module: str) -> None:
    heavy = {"torch", "ray", "transformers", "datasets", "pyarrow", "numpy", "lerobot"}
    assert not loaded_by(module) & heavy


def test_the_method_is_torch_only() -> None:
    method = [name for name in MODULES if name.startswith("craft_ray.method")]
    assert len(method) > 5
    assert not loaded_by(*method) & {"transformers", "datasets", "pyarrow", "ray"}


def test_no_test_imports_another_test_file() -> None:
    """What several share is in tests/support."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    assert len(files) > 50
    assert not [path for path in files if re.search(r"^\s*(from|import) tests\.\S*\btest_", path.read_text(), re.M)]
