"""`craft-ray demo`: the whole chain on real data that comes with a package, in a few minutes on two cores.

A teacher learns an old skill, or has it already; the anchor cache is built from it, and the arms learn a new skill:
plainly, and under a budget for the old one; then a small sweep searches for the setting that learns most of the new
skill. Started again in the same folder, the demo finds what is finished and computes nothing twice.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from craft_pipelines.compare import compare, met
from craft_pipelines.console import line, screen
from craft_pipelines.outputs import check_kept
from craft_pipelines.sweep.driver import plan_sweep, resume_sweep, sweep
from craft_pipelines.train import PlannedRun, train_run
from craft_ray.config import Experiment, dump_config, load_config
from craft_ray.errors import ConfigError
from craft_ray.extras import install, missing, require_lerobot
from craft_ray.run.folder import RunFolder
from craft_ray.run.identity import config_difference
from craft_ray.shipped import shipped
from craft_ray.storage.files import new_folder, write_atomically
from craft_ray.sweep.space import load_space
from craft_ray.sweep.trials import SweepFolder

CONFIGS = shipped("pipelines/configs")
SWEEP_SAMPLES = 4


@dataclass(frozen=True)
class Preset:
    """A demonstration: the module that makes its model and data, and its two configs."""

    module: str
    config: str
    """The comparison's config; that of a teacher that has to learn first has the suffix `_teacher`."""
    old: str
    new: str
    quick: tuple[str, ...]
    """Overrides for the comparison with --quick."""
    quick_teacher: tuple[str, ...] = ()
    """Overrides for the teacher with --quick. A different teacher needs a different name."""
    needs: str | None = None
    """A package of the extra `demo`."""
    model_from_data: bool = False
    """Whether the model is made to fit the data: its tokenizers, its ranges."""
    pretrained: bool = False
    """Whether the model has the old skill already; the data hold its own answers, so they are made after it."""
    with_sweep: bool = True
    reports: bool = False
    """Whether making the data takes long, so that `write_data` reports how far it is."""


PRESETS = {
    "digits": Preset(
        "craft_ray.examples.digits",
        "demo_digits",
        "reading digits upright",
        "reading them through a rotated, inverted camera",
        ("compare.seeds=[0]", "train.steps=100"),
        needs="sklearn",
    ),
    "text": Preset(
        "craft_ray.examples.text",
        "demo_text",
        "English documentation prose",
        "Python source",
        # Half the steps need a faster multiplier, and a token budget that is not decided by rounding.
        ("compare.seeds=[0]", "train.steps=100", "craft.lambda_lr=0.1", "compare.token_ce.epsilon_start=0.9"),
    ),
    "chat": Preset(
        "craft_ray.examples.chat",
        "demo_chat",
        "answering questions as the model did before",
        "the first line of a function's docstring",
        ("compare.seeds=[0]", "train.steps=24", "evaluation.old.data.limit=48", "evaluation.new.data.limit=48"),
        pretrained=True,
        with_sweep=False,
        reports=True,
    ),
    "robot": Preset(
        "craft_ray.examples.robot",
        "robot",
        "closing a drawer with a robot arm",
        "closing a door",
        (
            "model.path=teacher-quick/checkpoints/last/model",
            "craft.anchor_cache_dir=anchors-quick",
            "anchors.source.stride=2",
            "train.steps=250",
            "compare.arms=[baseline, hidden]",
            "evaluation.old.rollout.episodes=20",
            "evaluation.new.rollout.episodes=20",
        ),
        ("name=teacher-quick", "train.steps=600", "evaluation.old.rollout.episodes=20"),
        model_from_data=True,
        with_sweep=False,
        reports=True,
    ),
}


def demo(out: Path, preset_name: str, quick: bool) -> bool:
    """Run a preset into `out` and print what was kept and what was lost.

    Returns:
        Whether every constrained run met its budget and the sweep found a setting within its bounds.
    """
    started = time.perf_counter()
    preset = PRESETS[preset_name]
    if preset_name == "robot":
        require_lerobot(f"the preset {preset_name} runs a policy of LeRobot")
    if preset.needs is not None and missing(preset.needs):
        raise ConfigError(f"the preset {preset_name} needs scikit-learn's data: {install('demo')}")
    out = out.absolute()
    check_kept(out, "--out")
    searches = preset.with_sweep and not quick
    stages = 4 if searches else 3
    if preset.pretrained:
        print(f"1/{stages} the teacher has the old skill: {preset.old}")
        _make_inputs(preset, out)
    else:
        _make_inputs(preset, out)
        quickly = preset.quick_teacher if quick else ()
        teach_config = load_config(CONFIGS / f"{preset.config}_teacher.yaml", quickly, base=out)
        print(f"1/{stages} the teacher learns the old skill: {preset.old}")
        _teach(teach_config)
    print(f"2/{stages} the teacher's anchor cache, and the arms learn the new skill: {preset.new}")
    config = load_config(CONFIGS / f"{preset.config}.yaml", preset.quick if quick else (), base=out)
    config = config.changed({"about.old": preset.old, "about.new": preset.new})
    if quick:
        config = config.changed({"name": config.name + "-quick"})
    write_atomically(out / f"{config.name}.yaml", dump_config(config))  # as a start for other settings or seeds
    result = compare(config, config.compare.chosen, config.compare.seeds, out)
    print(f"3/{stages} the report")
    for sentence in conclusion(result, preset):
        print(sentence)
    found = True
    if searches:
        print(f"4/{stages} a sweep: the settings that learn most of the new skill and keep the old one")
        found = _search(config, out / "sweep")
    print(f"{time.perf_counter() - started:.0f} s in total; report: {out / 'report.html'}")
    return met(result) and found


def _make_inputs(preset: Preset, out: Path) -> None:
    """Make model and data unless they exist; each appears once it is complete.

    Raises:
        ConfigError: the folder contains the demo of another preset.
    """
    mark = out / "preset"
    if mark.exists() and mark.read_text() != preset.module:
        raise ConfigError(f"{out} holds the demo of {mark.read_text()}, not of {preset.module}: choose another --out")
    write_atomically(mark, preset.module)
    maker = importlib.import_module(preset.module)
    build_model, write_data = maker.build_model, maker.write_data
    if preset.model_from_data:
        build_model = partial(build_model, data=out / "data", final=out / "model")
    makers = [("data", write_data), ("model", build_model)]
    if preset.pretrained:
        makers = [("model", build_model), ("data", partial(write_data, model=out / "model"))]
    for name, make in makers:
        if not (out / name).exists():
            line(f"making {out / name}")
            with new_folder(out / name) as folder, screen() as shown:
                make(folder, **({"report": shown.progress} if name == "data" and preset.reports else {}))


def _teach(config: Experiment) -> None:
    folder = RunFolder(Path(config.output_dir) / config.name)
    if folder.finished() is not None:
        difference = config_difference(folder, config)
        if difference is not None:
            raise ConfigError(
                f"{folder.path} holds a teacher that was trained with another config ({difference}): choose another "
                f"--out, or remove {folder.path}"
            )
        print(f"  found in {folder.path}")
        return
    train_run(PlannedRun(config, folder))


def _search(config: Experiment, path: Path) -> bool:
    """Sweep over a few settings, or resume that sweep."""
    if SweepFolder(path).plan.exists():
        return sweep(*resume_sweep(path))
    # With so few trials, all run to the end: which ones asha would stop depends on which reports first.
    config = config.changed({"sweep.samples": SWEEP_SAMPLES, "sweep.scheduler": "none"})
    return sweep(*plan_sweep(config, load_space("craft"), path))


def conclusion(result: dict[str, Any], preset: Preset) -> Sequence[str]:
    """What was kept and what was lost, one line for each arm."""
    lines = [f"Old skill: {preset.old}. New skill: {preset.new}."]
    for arm, summary in result["summary"].items():
        label = "plain fine-tuning" if arm == "baseline" else f"CRaFT {arm}"
        kept, new = summary["old_ratio"], summary["new_ratio"]
        if kept is None:
            lines.append(f"  {label:18s} cannot be judged: the teacher itself does not have the old skill")
            continue
        line = f"  {label:18s} kept {kept:6.1%} of the old skill (lost {max(0.0, 1 - kept):.1%})"
        if arm != "baseline" and new is not None:
            line += f", new skill {new:.1%} of plain"
        if summary["feasible"] is not None and arm != "baseline":
            line += f", budget met on held-out anchors in {summary['feasible']} of {summary['runs']} runs"
        lines.append(line)
    return lines
