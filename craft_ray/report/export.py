"""The figures and the tables of a page as files: PDF and PNG, CSV and LaTeX."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from craft_ray.report.svg import STYLE, Plot
from craft_ray.report.table import Table
from craft_ray.storage.files import new_folder
from craft_ray.storage.paths import StoragePath

DOTS_PER_INCH = 200
INDEX = "index.json"
"""What each file shows, and the command that wrote them."""
EMBEDDED: dict[Any, Any] = STYLE | {"pdf.fonttype": 42}  # TrueType: journals refuse the default, Type 3


def plots_in(shown: Any) -> Iterator[Plot]:
    """Every figure among the values that a page shows, in their order."""
    if isinstance(shown, Plot):
        yield shown
    elif isinstance(shown, Mapping):
        yield from plots_in(list(shown.values()))
    elif isinstance(shown, list | tuple):
        for each in shown:
            yield from plots_in(each)


def write_files(plots: Sequence[Plot], tables: Sequence[Table], out: StoragePath, command: str) -> None:
    """Write `out/figures/NAME.pdf` and `.png`, `out/tables/NAME.csv` and `.tex`, and `out/index.json`.

    Args:
        out: a folder that does not exist; it appears with all files or not at all.
        command: what wrote them.

    Raises:
        StorageError: the files could not be written.
    """
    index = {
        "command": command,
        "figures": {plot.name: plot.description for plot in plots},
        "tables": {table.name: table.caption for table in tables},
    }
    with new_folder(out, last=INDEX) as folder:
        for part in ("figures", "tables"):
            (folder / part).mkdir()
        for plot in plots:
            _save(plot, folder / "figures" / plot.name)
        for table in tables:
            (folder / "tables" / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
            (folder / "tables" / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")
        (folder / INDEX).write_text(json.dumps(index, indent=2, ensure_ascii=False), encoding="utf-8")


def _save(plot: Plot, stem: Path) -> None:
    """Without the time and the program: equal runs give equal files."""
    pdf = {"CreationDate": None, "Creator": None, "Producer": None, "Title": plot.description}
    png = {"Software": None, "Description": plot.description}
    with matplotlib.rc_context(EMBEDDED):
        plot.figure.savefig(f"{stem}.pdf", metadata=pdf)
        plot.figure.savefig(f"{stem}.png", dpi=DOTS_PER_INCH, metadata=png)
