"""What an import must not load: Ray stays in `pipelines`, the configuration needs no torch. From the source: imports
between packages point in one direction, and imports between modules form no cycle."""

from __future__ import annotations

import ast
import graphlib
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import craft_pipelines
import pytest

import craft_ray

LEROBOT = ("craft_ray.lerobot", "craft_ray.examples.robot")
"""The only modules that import LeRobot; others import them only inside functions."""

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
def test_a_mistake_in_the_configuration_is_reported_without_torch(module: str) -> None:
    heavy = {"torch", "ray", "transformers", "datasets", "pyarrow", "numpy", "lerobot"}
    assert not loaded_by(module) & heavy


def test_the_method_is_torch_only() -> None:
    method = [name for name in MODULES if name.startswith("craft_ray.method")]
    assert len(method) > 5
    assert not loaded_by(*method) & {"transformers", "datasets", "pyarrow", "ray"}


# -- from the source: also imports inside functions


def sources() -> dict[str, Path]:
    """The file of each module of both packages."""
    found = {}
    for package in (craft_ray, craft_pipelines):
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for file in root.rglob("*.py"):
            parts = file.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


SOURCES = sources()


def statements(node: ast.AST, types: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement below a node that is executed at some point.

    Args:
        types: also those that only a type checker reads.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not types and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from statements(ast.Module([other], []), types)
        else:
            yield from statements(child, types)


def imported(text: str, types: bool = False) -> set[str]:
    """The modules that a source imports; of `from package import name` the submodule, where `name` is one of ours.

    Args:
        types: also those that only a type checker reads.
    """
    names: set[str] = set()
    for statement in statements(ast.parse(text), types):
        if isinstance(statement, ast.Import):
            names.update(alias.name for alias in statement.names)
        else:
            assert statement.module is not None, "imports are absolute"
            assert not statement.level, "imports are absolute"
            full = {f"{statement.module}.{alias.name}" for alias in statement.names}
            names |= {name if name in SOURCES else statement.module for name in full}
    return names


IMPORTS = {module: imported(file.read_text()) for module, file in SOURCES.items()}

FLOORS = (
    ("background", "errors", "extras", "interruption", "pace", "quiet", "shipped", "statistics", "storage", "workers"),
    ("config",),
    ("method",),
    ("data", "models", "lerobot"),
    ("anchors",),
    ("retention",),
    ("run",),
    ("tracking", "report", "sweep", "examples", "init", "lerobot.hook"),
)
"""The packages of craft_ray, from the lowest up: a package imports its own level and those below it. LeRobot's loop
with CRaFT's step in it uses all of them, as `craft_pipelines` does."""


def floor(module: str) -> int:
    package, _, inside = module.partition(".")
    if package == "craft_pipelines":
        return len(FLOORS)
    if not inside:
        return 0  # the version
    floors = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    return floors[inside] if inside in floors else floors[inside.partition(".")[0]]


def test_every_import_of_a_source_is_found() -> None:
    text = """
from typing import TYPE_CHECKING
import torch.nn
from craft_ray.models import base, load_model
if TYPE_CHECKING:
    import ray
else:
    import numpy
def inside():
    try:
        from craft_ray import errors
    except ImportError:
        import lerobot
"""
    found = imported(text)
    ours = {"craft_ray.models.base", "craft_ray.models", "craft_ray.errors"}
    assert found == ours | {"typing", "torch.nn", "numpy", "lerobot"}
    assert imported(text, types=True) == found | {"ray"}


def test_imports_form_no_cycle() -> None:
    """Not even among those that only a type checker reads."""
    assert len(SOURCES) > 100
    graph = {module: imported(file.read_text(), types=True) & SOURCES.keys() for module, file in SOURCES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a cycle of imports: " + " -> ".join(reversed(error.args[1])))


def test_imports_point_one_way() -> None:
    up = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in sorted(names & SOURCES.keys())
        if floor(name) > floor(module)
    ]
    assert not up


def test_ray_and_lerobot_are_imported_only_in_their_packages() -> None:
    for module, names in IMPORTS.items():
        packages = {name.partition(".")[0] for name in names}
        assert "ray" not in packages or module.startswith("craft_pipelines."), module
        assert "lerobot" not in packages or module.startswith(LEROBOT), module


def test_no_test_imports_another_test_file() -> None:
    """Helpers that several test files share are in tests/support."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    assert len(files) > 50
    assert not [path for path in files if re.search(r"^\s*(from|import) tests\.\S*\btest_", path.read_text(), re.M)]
