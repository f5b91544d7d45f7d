"""The command `craft-ray`: one subcommand for each stage.

Exit codes: 0 done; 2 usage or config; 3 finished, but the retention budget was not met; 4 cache refused; 1 anything
else. A user's mistake is one line, never a traceback.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from craft_ray.config import Experiment, load_config
from craft_ray.errors import NOT_MET, ConfigError, CraftError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
anchors_app = typer.Typer(no_args_is_help=True, help="Build, check, show and import anchor caches.")
app.add_typer(anchors_app, name="anchors")

Config = Annotated[Path, typer.Argument(help="a YAML config", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. craft.lambda_lr=0.05")]


def main() -> None:
    """Run the command; a known error becomes one line and its exit code."""
    try:
        app()
    except CraftError as error:
        print(f"craft-ray: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("craft-ray: interrupted", file=sys.stderr)
        sys.exit(130)


@anchors_app.command("build")
def anchors_build(config: Config, overrides: Overrides = None) -> None:
    """Run the teacher over the anchors; goes on where an interrupted build stopped."""
    experiment = load_config(config, overrides or [])
    _quiet()
    from pipelines.anchors import build

    build(experiment)


@app.command("train")
def train(
    config: Annotated[Path | None, typer.Argument(help="a YAML config", show_default=False)] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run directory")] = None,
    dry_run: Annotated[bool, typer.Option(help="check everything, run 3 steps, print the plan")] = False,
) -> None:
    """Fine-tune under the retention budget."""
    experiment = _experiment(config, overrides, resume)
    _quiet()
    from pipelines import train as stage
    from pipelines.dry_run import dry_run as run_dry

    if dry_run:
        run_dry(experiment)
        return
    run = stage.resume_run(resume, experiment) if resume else stage.plan_run(experiment)
    result = stage.carry_out(run)
    print(stage.summary(result, run.folder.path))
    if result["arm"] != "baseline" and not result["feasible"]:
        sys.exit(NOT_MET)


def _experiment(config: Path | None, overrides: list[str] | None, resume: Path | None) -> Experiment:
    if config is not None:
        return load_config(config, overrides or [])
    if resume is None:
        raise ConfigError("name a config: craft-ray train CONFIG, or craft-ray train --resume RUN")
    if not (resume / "config.yaml").exists():
        raise ConfigError(f"{resume} is no run directory: it has no config.yaml")
    return load_config(resume / "config.yaml")


def _quiet() -> None:
    from craft_ray.quiet import quiet_libraries

    quiet_libraries()


if __name__ == "__main__":
    main()
