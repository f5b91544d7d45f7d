"""The command `craft-ray`: one subcommand for each stage.

Exit codes: 0 done; 2 usage or config; 3 finished, but the retention
budget or craft.keep was not met, or no setting of a sweep is within the bounds; 4 cache
refused; 130 interrupted (Ctrl-C, SIGTERM); 1 anything else. A user's mistake is reported in
one line, never as a traceback.
"""

from __future__ import annotations

import io
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from craft_pipelines.configs import config_app, init
from craft_pipelines.ending import end_interrupted, interruption_in, path_refused
from craft_pipelines.finished import export, interpolate, merge, price, push, report
from craft_ray import interruption
from craft_ray.config import load_config, parse_overrides
from craft_ray.config.arm_selection import with_arms
from craft_ray.errors import NOT_MET, ConfigError, CraftError
from craft_ray.quiet import importing
from craft_ray.storage.paths import storage_path

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
anchors_app = typer.Typer(no_args_is_help=True, help="Build, check, show and import anchor caches.")
app.add_typer(anchors_app, name="anchors")
app.add_typer(config_app, name="config")
app.command("init")(init)

Config = Annotated[Path, typer.Argument(help="a YAML config", show_default=False)]
CacheFolder = Annotated[str, typer.Argument(help="the folder of an anchor cache", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. craft.lambda_lr=0.05")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"craft-ray {version('craft-ray')}")
        raise typer.Exit


def main() -> None:
    """Run the command; a known error becomes one line and its exit code."""
    interruption.listen()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log has each line when it is printed
    try:
        app(prog_name="craft-ray")
    except BaseException as error:
        # Typer turns an interruption into its exit code. After a signal, any other end is a consequence of it.
        if interruption.signalled() or interruption_in(error) is not None:
            end_interrupted(error)
        mistake = error if isinstance(error, CraftError) else path_refused(error)
        if mistake is None:
            raise
        print(f"craft-ray: {mistake.message}", file=sys.stderr)
        sys.exit(mistake.exit_code)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None:
    """Options of the command itself; its help is the program's."""


@anchors_app.command("build")
def anchors_build(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the rows; say what it would store")] = False,
) -> None:
    """Run the teacher over the anchors; resumes an interrupted build."""
    experiment = load_config(config, overrides or [])
    with importing():
        from craft_pipelines.anchors import build, preview

    (preview if dry_run else build)(experiment)


@anchors_app.command("show")
def anchors_show(folder: CacheFolder) -> None:
    """Show what a cache contains: its identity, rows, vectors, size, and whether it is complete."""
    from craft_ray.anchors.show import describe

    print("\n".join(describe(storage_path(folder))))


@anchors_app.command("verify")
def anchors_verify(
    folder: CacheFolder,
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="the YAML config that names the model")] = None,
    reforward: Annotated[
        int | None, typer.Option(min=1, help="rows to run the model on again (32 with --config)", show_default=False)
    ] = None,
) -> None:
    """Check a cache: its files against its manifest and, with --config, its rows against the model."""
    if config is None and (reforward or overrides):
        raise ConfigError("running the model again needs its config: add --config CONFIG")
    experiment = load_config(config, overrides or []) if config else None
    with importing():
        from craft_pipelines.anchors import verify

    verify(storage_path(folder), experiment, reforward or 32)


@anchors_app.command("import")
def anchors_import(
    legacy: Annotated[Path, typer.Argument(help="a folder of shard_*.pt", show_default=False)],
    config: Config,
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option(help="run the teacher on some rows again and compare")] = True,
) -> None:
    """Convert legacy torch shards into a cache in craft.anchor_cache_dir. Code in them is never run."""
    experiment = load_config(config, overrides or [])
    with importing():
        from craft_pipelines.anchors import import_legacy

    import_legacy(legacy, experiment, check)


@app.command("train")
def train(
    config: Annotated[Path | None, typer.Argument(help="a YAML config", show_default=False)] = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="resume this run directory")] = None,
    dry_run: Annotated[bool, typer.Option(help="check everything, run 3 steps, print the plan")] = False,
) -> None:
    """Fine-tune under the retention budget."""
    if dry_run and resume is not None:
        raise ConfigError("--dry-run checks a run that has not started, --resume continues a started one: choose one")
    if resume is not None and config is not None and "=" in str(config):
        config, overrides = None, [str(config), *(overrides or [])]
    if resume is None and config is None:
        raise ConfigError("no config given: craft-ray train CONFIG, or craft-ray train --resume RUN")
    experiment = None if config is None else load_config(config, overrides or [])
    with importing():
        from craft_pipelines import train as stage
        from craft_pipelines.dry_run import dry_run as run_dry

    if resume is not None:
        changed = parse_overrides(overrides or []) if config is None else {}
        run = stage.resume_run(storage_path(resume), experiment, changed)
    else:
        assert experiment is not None
        if dry_run:
            run_dry(experiment)
            return
        run = stage.plan_run(experiment)
    result = stage.train_run(run)
    print(f"run: {run.folder.path}")
    if result.get("multiplier") == "adaptive" and not result["feasible"]:
        sys.exit(NOT_MET)


@app.command("compare")
def compare(
    config: Config,
    overrides: Overrides = None,
    arms: Annotated[
        str | None,
        typer.Option(help="comma-separated: baseline,token_ce,hidden (these by default), variants, others; or all"),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="comma-separated numbers")] = None,
    out: Annotated[str | None, typer.Option(help="folder for runs and report")] = None,
) -> None:
    """Run the arms over seeds on one cache, and write the report."""
    changes: dict[str, Any] = {} if arms is None else {"compare.arms": arms.split(",")}
    if seeds is not None:
        if not re.fullmatch(r"\d+(,\d+)*", seeds):
            raise ConfigError(f"--seeds is '{seeds}': give numbers separated by commas, e.g. 0,1,2")
        changes["compare.seeds"] = seeds.split(",")
    experiment = load_config(config, overrides or []).changed(changes)
    with importing():
        from craft_pipelines import compare as stage

    experiment, left_out = with_arms(experiment, experiment.compare.chosen)
    for line in left_out:
        print(line)
    folder = (storage_path(out) if out else stage.default_folder(experiment)).absolute()
    result = stage.compare(experiment, experiment.compare.chosen, experiment.compare.seeds, folder)
    print(f"report: {folder / 'report.html'}")
    if not stage.met(result):
        sys.exit(NOT_MET)


@app.command("sweep")
def sweep(
    config: Annotated[Path | None, typer.Argument(help="a YAML config with an objective", show_default=False)] = None,
    overrides: Overrides = None,
    space: Annotated[str | None, typer.Option(help="a YAML file, or craft, price, ablation or smoke")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="number of settings to try (for each point of a grid)")
    ] = None,
    repeat: Annotated[int | None, typer.Option(min=1, help="number of seeds for each setting")] = None,
    out: Annotated[str | None, typer.Option(help="folder for trials and report")] = None,
    resume: Annotated[str | None, typer.Option(help="resume the sweep in this folder")] = None,
) -> None:
    """Search for the settings that do best within the bounds of the objective."""
    from craft_ray.sweep.space import load_space

    if resume is not None and (repeat is not None or out is not None):
        raise ConfigError("a sweep resumes in its own folder and with its own seeds: omit --out and --repeat")
    if resume is not None and config is not None and "=" in str(config):
        config, overrides = None, [str(config), *(overrides or [])]
    if resume is None and (config is None or space is None):
        raise ConfigError("no config or no space given: craft-ray sweep CONFIG --space craft")
    changes = {"sweep.samples": samples, "sweep.repeat": repeat}
    experiment = None
    if config is not None:
        experiment = load_config(config, overrides or [])
        experiment = experiment.changed({key: value for key, value in changes.items() if value is not None})
    searched = None if space is None else load_space(space)
    with importing():
        from craft_pipelines.sweep import driver as stage

    if resume is not None:
        changed = parse_overrides(overrides or []) if config is None else {}
        folder, plan = stage.resume_sweep(storage_path(resume).absolute(), experiment, searched, samples, changed)
    else:
        assert experiment is not None
        assert searched is not None
        folder, plan = stage.plan_sweep(experiment, searched, storage_path(out).absolute() if out else None)
    if not stage.sweep(folder, plan):
        sys.exit(NOT_MET)


@app.command("evaluate")
def evaluate(
    config: Config,
    overrides: Overrides = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="a run, one of its checkpoints, or a model folder; can be given several times"),
    ] = None,
    out: Annotated[str | None, typer.Option(help="a .json file for the scores; samples are written next to it")] = None,
) -> None:
    """Score the model and its checkpoints side by side on the evaluation data of the config."""
    experiment = load_config(config, overrides or [])
    with importing():
        from craft_pipelines import evaluate as stage

    stage.evaluate(experiment, [storage_path(each) for each in checkpoint or []], storage_path(out) if out else None)


app.command("merge")(merge)
app.command("interpolate")(interpolate)
app.command("report")(report)
app.command("export")(export)
app.command("push")(push)
app.command("price")(price)


@app.command("submit", context_settings={"allow_interspersed_args": False})
def submit(
    command: Annotated[list[str], typer.Argument(help="the command that the cluster runs", show_default=False)],
    address: Annotated[
        str | None,
        typer.Option(help="the cluster's dashboard [default: $RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265]"),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="follow the log, and exit with the command's code")
    ] = True,
    working_dir: Annotated[Path, typer.Option(help="the folder to copy to the cluster for the command")] = Path("."),
) -> None:
    """Run a command as a job of a cluster: craft-ray submit -- craft-ray train run.yaml."""
    from craft_pipelines.submit import submit as run

    sys.exit(run(command, address, working_dir, wait))


@app.command("doctor")
def doctor(
    address: Annotated[
        str | None,
        typer.Option(help="a cluster's dashboard, http://..., or its address for processes [default: $RAY_ADDRESS]"),
    ] = None,
    storage: Annotated[
        list[str] | None, typer.Option(help="a folder, or s3://..., of caches or runs; can be given several times")
    ] = None,
) -> None:
    """Check a cluster, or without one this machine, for what would make a run fail. Exit code 1 if a check fails."""
    from craft_pipelines.doctor import doctor as run

    if not run(address, storage or []):
        sys.exit(1)


@app.command("demo")
def demo(
    out: Annotated[
        Path | None, typer.Option(help="folder for everything that the demo writes [default: craft-demo-PRESET]")
    ] = None,
    preset: Annotated[str, typer.Option(help="digits, text, chat or robot")] = "digits",
    quick: Annotated[bool, typer.Option("--quick", help="one seed, fewer steps, no sweep")] = False,
) -> None:
    """Show on real data what plain fine-tuning forgets and what a budget keeps."""
    with importing():
        from craft_pipelines import demo as stage

    if preset not in stage.PRESETS:
        raise ConfigError(f"there is no preset '{preset}': choose {' or '.join(stage.PRESETS)}")
    if out is not None and out.parts[:1] == ("s3:",):
        raise ConfigError("--out is in an object store, but a demo writes to a disk: choose a folder on it")
    if not stage.demo(out or Path(f"craft-demo-{preset}"), preset, quick):
        sys.exit(NOT_MET)


if __name__ == "__main__":
    main()
