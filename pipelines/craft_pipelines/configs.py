"""`craft-ray init`, which writes a first config, and `craft-ray config`, which shows what one means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from craft_ray.config import dump_config, json_schema, load_config, parse_config, read_yaml
from craft_ray.errors import ConfigError, StorageError
from craft_ray.init import Preset
from craft_ray.quiet import quiet_libraries, uncollected

config_app = typer.Typer(no_args_is_help=True, help="Show what a config means, and describe its keys to an editor.")


def init(
    model: Annotated[str, typer.Option(help="a model's folder or its name on the hub", show_default=False)],
    task: Annotated[str, typer.Option(help="training data of the new skill", show_default=False)],
    anchors: Annotated[str, typer.Option(help="inputs of the old skill; no labels needed", show_default=False)],
    old: Annotated[str | None, typer.Option(help="labelled data to score the old skill on")] = None,
    new: Annotated[str | None, typer.Option(help="labelled data to score the new skill on")] = None,
    preset: Annotated[
        Preset | None, typer.Option(help="all weights, an adapter, or a policy [default: what fits the model]")
    ] = None,
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("run.yaml"),
) -> None:
    """Look at the model and the data, and write a first config with comments. It asks nothing."""
    if out.exists():
        raise ConfigError(f"{out} exists: remove it, or write another file with --out")
    with uncollected():
        quiet_libraries()
        from craft_ray.init.draft import Asked, draft
        from craft_ray.init.sizes import Hardware
    text = draft(Asked(model, task, anchors, old, new, preset), Hardware.here())
    parse_config(read_yaml(text), str(out))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror}): choose another file with --out") from None
    print(text, end="")
    print(f"wrote {out}; next: craft-ray anchors build {out}")


@config_app.command("show")
def show(
    config: Annotated[Path, typer.Argument(help="a YAML config", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. craft.lambda_lr=0.05")] = None,
    every: Annotated[bool, typer.Option("--all/--changed", help="every key, or only what is not its default")] = True,
) -> None:
    """Print a config as the stages read it: with overrides, absolute paths and every default."""
    experiment = load_config(config, overrides or [])
    print(dump_config(experiment, changed=not every), end="")


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a config. Editors complete and check keys by it (docs/first_config.md)."""
    text: dict[str, Any] = json_schema()
    print(json.dumps(text, indent=2, ensure_ascii=False))
