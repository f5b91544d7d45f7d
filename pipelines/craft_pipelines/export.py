"""`craft-ray export`: the figures and tables of a report as files for a paper."""

from __future__ import annotations

import json
import shlex
from typing import Any

from craft_pipelines.outputs import check_new_folder
from craft_ray.errors import ConfigError
from craft_ray.report.export import plots_in, write_files
from craft_ray.report.html import view
from craft_ray.report.runs import read_runs
from craft_ray.report.summary import summarize
from craft_ray.report.tables import report_tables
from craft_ray.run.folder import RunFolder, command_line
from craft_ray.storage.paths import StoragePath, storage_path
from craft_ray.sweep.html import plots
from craft_ray.sweep.results import read_results
from craft_ray.sweep.tables import trials_table
from craft_ray.sweep.trials import SweepFolder


def export(source: StoragePath, out: StoragePath, say: Any = print) -> None:
    """Write what the report of `source` shows into the new folder `out`.

    Args:
        source: a finished run, the folder of a comparison or of another report of runs, or a sweep.

    Raises:
        ConfigError: `source` is none of these, a run of it is not finished or missing, or `out` exists.
        StorageError: the files could not be written.
    """
    check_new_folder(out, "the files")
    if (source / "sweep.yaml").exists():
        result = read_results(SweepFolder(source))
        if not result.trials:
            raise ConfigError(f"the sweep {source} has no trial yet: resume it with sweep --resume {source}")
        figures, tables = list(plots_in(plots(result))), [trials_table(result)]
    else:
        runs = read_runs(runs_of(source))
        summary = summarize([run.result for run in runs])
        figures, tables = list(plots_in(view(runs, summary))), report_tables(runs)
    write_files(figures, tables, out, shlex.join(command_line()))
    say(f"{len(figures)} figures and {len(tables)} tables: {out}")


def runs_of(source: StoragePath) -> list[RunFolder]:
    """The run in a folder, or the runs of the report in it.

    Raises:
        ConfigError: the folder has neither, or a run of the report is gone.
    """
    if (source / "config.yaml").exists():
        return [RunFolder(source)]
    reported = _reported(source)
    if reported is None:
        raise ConfigError(
            f"{source} is neither a run (config.yaml), nor a folder with a report of runs (result.json), nor a sweep "
            f"(sweep.yaml): specify one of them"
        )
    return [RunFolder(_found(source, path)) for path in reported]


def _reported(source: StoragePath) -> list[str] | None:
    """The paths of a report's runs when it was written; None if there is no report."""
    path = source / "result.json"
    if not path.exists():
        return None
    try:
        return [run["path"] for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not what a report of runs writes: specify another folder") from None


def _found(source: StoragePath, path: str) -> StoragePath:
    """A run of a report: next to it, where a comparison has its runs, or else where it was."""
    written = storage_path(path)
    for place in (source / "runs" / written.name, written):
        if (place / "config.yaml").exists():
            return place
    raise ConfigError(f"the run {path} of the report in {source} is missing: restore it, or report the others again")
