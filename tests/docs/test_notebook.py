"""The notebook of the documentation: it is stored without outputs, and runs from its first cell to its last."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"


def test_it_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_it_runs_and_shows_that_the_budget_keeps_the_old_skill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # craft-ray
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "craft-ray: " not in printed  # how a command ends that fails
    assert "Traceback" not in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    summary = json.loads((tmp_path / "craft-notebook" / "comparison" / "result.json").read_text())["summary"]
    assert summary["hidden"]["old_ratio"] > summary["baseline"]["old_ratio"] + 0.1
    for arm, numbers in summary.items():
        assert f"{arm:8}  old skill kept: {numbers['old_ratio']:6.1%}" in printed
        assert numbers["new_after"] > 0.3  # chance is 0.1
