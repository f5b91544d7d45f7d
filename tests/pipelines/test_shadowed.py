"""Modules of a project that a job would import in place of installed ones."""

from __future__ import annotations

from pathlib import Path

from craft_pipelines.shadowed import shadowed
from craft_pipelines.working_dir import contents


def test_names_of_installed_modules_and_of_pythons_own(tmp_path: Path) -> None:
    for name in (
        *("statistics.py", "datasets/__init__.py", "yaml.py"),
        *("my_model.py", "models_of_mine/__init__.py"),  # nobody else has these names
        *("torch/notes.txt", "scripts/json.py", "train-it.py"),  # no packages, and not at the top
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert shadowed(tmp_path, contents(tmp_path, [])) == ["datasets", "statistics.py", "yaml.py"]
    assert shadowed(tmp_path, contents(tmp_path, ["/datasets", "*.py"])) == []
