"""The model card of a finished run: what a repository on the hub says about the model, from the run's own files.

A card is public. It names data and models on the hub as they are, and everything else without the folder that it is in;
passwords in addresses and values of secret environment variables are removed.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError
from craft_ray.report.card_data import DataUse, data_uses, is_local, last_part
from craft_ray.report.runs import FinishedRun
from craft_ray.report.table import Table, markdown_escaped
from craft_ray.report.wording import METRICS, NONE, percent, score_of
from craft_ray.run.metrics import result_lines
from craft_ray.tracking.content import without_credentials

TASKS = {"causal_lm": "text-generation", "vision_language": "image-text-to-text", "lerobot": "robotics"}
"""The hub's name of what a kind of model does."""
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY", re.IGNORECASE)
SHORTEST_SECRET = 8
ABSOLUTE = re.compile(r"(?<![\w/.:-])(?:s3:/|~)?(?:/[^/\s'\"=,;:()\[\]{}]+)*/([^/\s'\"=,;:()\[\]{}]+)/?")
"""An absolute path within other text, with its last part; the spaces of a path end it."""


@dataclass(frozen=True)
class CardFields:
    """What the files of a run do not say."""

    license: str | None = None
    """An identifier of the hub, e.g. `apache-2.0`; `other` needs both of the next."""
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    """The teacher's name on the hub, for one that was a folder."""

    def check(self) -> None:
        """
        Raises:
            ConfigError: the licence is incomplete.
        """
        named = self.license_name is not None or self.license_link is not None
        if (self.license == "other") != (self.license_name is not None and self.license_link is not None):
            raise ConfigError(
                "a licence that the hub does not know needs all of --license other, --license-name NAME and "
                "--license-link ADDRESS"
            )
        if named and self.license != "other":
            raise ConfigError(f"--license-name and --license-link belong to --license other, not to {self.license}")


def model_card(run: FinishedRun, name: str, fields: CardFields, arms: Table | None = None) -> ModelCard:
    """The card of a run's model.

    Args:
        name: the repository's name, without its owner.
        arms: the arms of the comparison that the run is part of.

    Raises:
        ConfigError: the licence is incomplete.
    """
    fields.check()
    text = "\n\n".join(_body(run, name, fields, arms))
    return ModelCard(_without_secrets(f"---\n{_metadata(run, name, fields).to_yaml()}\n---\n\n{text}\n"))


def base_model(config: Experiment, fields: CardFields) -> str | None:
    """The teacher's name on the hub; None if it is not known to have one."""
    return fields.base_model or (config.model.path if not is_local(config.model.path) else None)


def _metadata(run: FinishedRun, name: str, fields: CardFields) -> ModelCardData:
    config, uses = run.config, data_uses(run.config)
    library = {"lerobot": "lerobot"}.get(config.model.kind, "transformers" if config.adapter is None else "peft")
    trained_on = [use.path for use in uses if use.public and not use.scored]
    return ModelCardData(
        base_model=base_model(config, fields),
        datasets=list(dict.fromkeys(trained_on)) or None,
        license=fields.license,
        license_name=fields.license_name,
        license_link=fields.license_link,
        library_name=library,
        pipeline_tag=TASKS[config.model.kind],
        tags=["craft-ray", "continual-learning", *(["lora"] if config.adapter is not None else [])],
        model_name=name,
        eval_results=[_evaluated(run, use) for use in uses if use.scored and _known(run, use)] or None,
    )


def _scores(run: FinishedRun) -> dict[str, dict[str, Any]]:
    """The scores by skill: each old one, or the one of a config without names, and the new one."""
    result = run.result
    return {**(result.get("skills") or {"old": result["old"]}), "new": result["new"]}


def _known(run: FinishedRun, use: DataUse) -> bool:
    after = _scores(run).get(use.skill, {}).get("after")
    return after is not None and math.isfinite(after)


def _evaluated(run: FinishedRun, use: DataUse) -> EvalResult:
    score = _scores(run)[use.skill]
    return EvalResult(
        task_type=TASKS[run.config.model.kind],
        dataset_type=use.path if use.public else "private",
        dataset_name=f"{use.path} ({use.skill} skill)",
        dataset_config=use.skill,  # without it two private sets would be one
        dataset_split=use.split,
        metric_type=score["metric"],
        metric_value=score["after"],
    )


def _body(run: FinishedRun, name: str, fields: CardFields, arms: Table | None) -> Iterator[str]:
    config = run.config
    teacher = base_model(config, fields) or f"a model that is not public (`{last_part(config.model.path)}`)"
    weights = "" if run.teacher is None else f", weights `{run.teacher}`"
    yield f"# {markdown_escaped(name)}"
    yield (
        f"{_trained(config)} of {teacher}{weights}, trained for {run.result['steps']} steps with craft-ray "
        f"(constrained retention fine-tuning), arm `{run.arm}`, seed {run.seed}."
    )
    yield "## What was learnt, and what was kept"
    yield "\n".join(f"- {markdown_escaped(line)}" for line in result_lines(run.result))
    yield _scores_table(run).markdown().rstrip("\n")
    if arms is not None:
        yield "## Beside other ways of training"
        yield f"{arms.caption}. This model is of the arm {markdown_escaped(run.style.label)}."
        yield arms.markdown().rstrip("\n")
    yield "## Data"
    yield "\n".join(f"- {use.purpose}: {_described(use)}" for use in data_uses(config))
    yield "## How to load it"
    yield f"```python\n{_loading(config)}\n```"
    yield "## How it was trained"
    if run.environment is not None:
        yield "```\n" + "\n".join(map(public_command, _commands(config, run.environment["command"]))) + "\n```"
    yield f"Settings that are not the default:\n\n```yaml\n{_settings(config)}```"
    if run.environment is not None:
        yield _environment(run.environment)


def _commands(config: Experiment, own: Sequence[str]) -> list[Sequence[str]]:
    """The command of a run, after the one that builds its cache. A comparison and a sweep build theirs themselves, and
    a resumed run's command names no config to build from."""
    builds = config.anchors is not None and config.craft.anchor_cache_dir is not None
    if not builds or list(own[:2]) != ["craft-ray", "train"] or any(word.startswith("--") for word in own):
        return [own]
    return [["craft-ray", "anchors", "build", *own[2:]], own]


def _trained(config: Experiment) -> str:
    return "All weights" if config.adapter is None else f"A LoRA adapter (rank {config.adapter.r})"


def _scores_table(run: FinishedRun) -> Table:
    rows = [
        [
            skill, METRICS[score["metric"]], score_of(score["before"], score["metric"]),
            score_of(score["after"], score["metric"]), percent(score["ratio"]) if skill != "new" else NONE,
            str(score["samples"]),
        ]
        for skill, score in _scores(run).items()
        if score.get("after") is not None
    ]  # fmt: skip
    return Table("scores", "", ["Skill", "Metric", "Before", "After", "Of the teacher's", "Samples"], rows, [])


def _described(use: DataUse) -> str:
    where = f"[{use.path}](https://huggingface.co/datasets/{use.path})" if use.public else f"`{use.path}`, not public"
    if use.split is not None:
        where += f", split `{use.split}`"
    return where + (f", the first {use.limit} rows" if use.limit is not None else "")


def _loading(config: Experiment) -> str:
    if config.model.kind == "lerobot":
        return (
            "from huggingface_hub import snapshot_download\n\n"
            'folder = snapshot_download("REPOSITORY")  # for model.path'
        )
    auto = {"causal_lm": "AutoModelForCausalLM", "vision_language": "AutoModelForImageTextToText"}[config.model.kind]
    needs = "" if config.adapter is None else "  # transformers loads the adapter into its base model; needs peft"
    return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("REPOSITORY"){needs}'


def _settings(config: Experiment) -> str:
    """The changed settings without places: outputs are left out, inputs are named by their last part."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    for key in ("output_dir", "tracking", "workers", "compare", "sweep", "objective", "name"):
        tree.pop(key, None)
    return str(yaml.safe_dump(_public(tree), sort_keys=False, allow_unicode=True))


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return _public_text(value) if isinstance(value, str) else value


def public_command(command: Sequence[str]) -> str:
    """A command as a user types it, without the folders of its paths and without passwords in addresses."""
    return shlex.join(map(_public_argument, command))


def _public_argument(argument: str) -> str:
    key, equals, value = argument.partition("=")
    return f"{key}={_public_text(value)}" if equals and not is_local(key) else _public_text(argument)


def _public_text(text: str) -> str:
    return last_part(text) if is_local(text) else ABSOLUTE.sub(r"\1", without_credentials(text))


def _without_secrets(text: str) -> str:
    """The text without the values of environment variables that are named like secrets."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text


def _environment(environment: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    gpus = ", ".join(environment["gpus"]) or "no GPU"
    return f"Python {environment['python']}, {packages}; {environment['system']}, {gpus}."
