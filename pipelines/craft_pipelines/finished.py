"""The commands on what is finished: `craft-ray report`, `export`, `push`, `price`, `merge` and `interpolate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from craft_ray.errors import ConfigError
from craft_ray.quiet import importing
from craft_ray.storage.paths import storage_path


def merge(
    run: Annotated[
        str,
        typer.Argument(help="a run with an adapter or a sharded one, or one of its checkpoints", show_default=False),
    ],
    out: Annotated[str, typer.Argument(help="a new folder for the whole model", show_default=False)],
) -> None:
    """Add a run's adapter to the weights of its teacher, or put a sharded checkpoint together, and save a plain model
    folder."""
    with importing():
        from craft_pipelines.merge import merge as stage

    stage(storage_path(run).absolute(), storage_path(out).absolute())


def interpolate(
    run: Annotated[str, typer.Argument(help="a finished run, or one of its checkpoints", show_default=False)],
    out: Annotated[str, typer.Argument(help="a new folder for the model", show_default=False)],
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="0 is the teacher, 1 the run [default: the best on validation]")
    ] = None,
) -> None:
    """Mix the weights of a run with its teacher's (WiSE-FT), and save the model."""
    with importing():
        from craft_pipelines.interpolate import interpolate as stage

    stage(storage_path(run).absolute(), storage_path(out).absolute(), alpha)


def report(
    runs: Annotated[list[str], typer.Argument(help="run directories", show_default=False)],
    out: Annotated[str, typer.Option(help="folder for report.html and result.json")] = ".",
) -> None:
    """Write the report of finished runs."""
    with importing():
        from craft_pipelines.outputs import check_kept
        from craft_ray.report.html import write_report
        from craft_ray.run.folder import RunFolder, command_line

    target = storage_path(out)
    check_kept(target, "--out")
    folders = [RunFolder(storage_path(path).absolute()) for path in runs]
    for folder in folders:
        if not folder.path.exists():
            raise ConfigError(f"there is no run at {folder.path}: give run directories")
        if folder.finished() is None:
            raise ConfigError(f"{folder.path} is not a finished run: it has no result.json; continue it with --resume")
    write_report(folders, target, title=folders[0].config().name, command=shlex.join(command_line()))
    print(f"report: {target / 'report.html'}")


def export(
    source: Annotated[
        str, typer.Argument(help="a run, a folder with a report of runs, or a sweep", show_default=False)
    ],
    out: Annotated[str, typer.Argument(help="a new folder for the files", show_default=False)],
) -> None:
    """Save the figures of a report as PDF and PNG, and its tables as CSV and LaTeX."""
    with importing():
        from craft_pipelines.export import export as stage

    stage(storage_path(source).absolute(), storage_path(out).absolute())


def push(
    run: Annotated[str, typer.Argument(help="a finished run", show_default=False)],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="create the repository as a private one")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--card-only", help="write the card into the run's folder, and send nothing")
    ] = False,
    card: Annotated[Path | None, typer.Option(help="send this card, e.g. an edited one of a dry run")] = None,
    license: Annotated[str | None, typer.Option(help="the hub's identifier of a licence, e.g. apache-2.0")] = None,
    license_name: Annotated[str | None, typer.Option(help="with --license other: its name")] = None,
    license_link: Annotated[str | None, typer.Option(help="with --license other: its address")] = None,
    base_model: Annotated[str | None, typer.Option(help="the teacher's name on the hub, if it was a folder")] = None,
    report: Annotated[
        str | None, typer.Option(help="a report with this run, for the table of arms [default: its comparison's]")
    ] = None,
) -> None:
    """Send a run's model to the hub, with a card that says what was learnt and what was kept."""
    with importing():
        from craft_pipelines.push import push as stage
        from craft_ray.report.card import CardFields

    fields = CardFields(license, license_name, license_link, base_model)
    beside = None if report is None else storage_path(report).absolute()
    stage(storage_path(run).absolute(), repository, fields, private, dry_run, card, beside)


def price(
    runs: Annotated[list[str], typer.Argument(help="run directories, or sweeps", show_default=False)],
    keep: Annotated[str, typer.Option(help="comma-separated parts of the old skill")] = "0.9,0.95,0.99",
) -> None:
    """Report from validations what keeping a part of the old skill costs of the new one."""
    try:
        targets = [float(part) for part in keep.split(",")]
    except ValueError:
        targets = []
    if not targets or not all(0 < target <= 1 for target in targets):
        raise ConfigError(f"--keep is '{keep}': give parts of the old skill separated by commas, e.g. 0.9,0.95")
    with importing():
        from craft_ray.report.price import points_of, price_lines, runs_at

    points, metric = points_of(runs_at([storage_path(path).absolute() for path in runs]))
    print("\n".join(price_lines(points, metric, targets)))
