"""The text of a first config: every value with the reason for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from craft_ray.errors import ConfigError
from craft_ray.init import Preset
from craft_ray.init.data import DataFacts, chat_wanted, look_at_data
from craft_ray.init.model import ModelFacts, look_at_model
from craft_ray.init.sizes import EPOCHS, SHORT_ANSWER, SMALL, Hardware, Sizes, choose, learning_rate

HELD_OUT = 10
"""A tenth of the data is held out if no evaluation data are named."""
FEWEST_HELD_OUT = 20
"""With fewer rows than this in that tenth, nothing is held out."""

REPLIES = 8
"""Answers that the report shows next to a perplexity, before and after."""


@dataclass(frozen=True)
class Asked:
    """What the command was given."""

    model: str
    task: str
    anchors: str
    old: str | None = None
    new: str | None = None
    preset: Preset | None = None


def draft(asked: Asked, hardware: Hardware) -> str:
    """A commented YAML config that `craft-ray train` accepts.

    Raises:
        ConfigError, DataError: the model or the data do not open, or do not fit each other.
    """
    model = look_at_model(asked.model)
    if (asked.preset == "robot") != (model.kind == "lerobot") and asked.preset != "lora" and asked.preset is not None:
        raise ConfigError(
            f"--preset {asked.preset} and --model {asked.model}, which is of kind {model.kind}, do not fit: the preset "
            f"robot is for policies of LeRobot, leave --preset out to have the right one"
        )
    task = look_at_data(asked.task, "--task", model, labelled=True)
    anchors = look_at_data(asked.anchors, "--anchors", model, labelled=False)
    if model.kind == "lerobot":
        if asked.old or asked.new:
            raise ConfigError(
                "a policy is scored in a simulator and not on data: leave --old and --new out, and write "
                "evaluation.old.rollout and evaluation.new.rollout (docs/lerobot.md)"
            )
        return _robot(asked, model, task, anchors, hardware)
    old = None if asked.old is None else look_at_data(asked.old, "--old", model, labelled=True)
    new = None if asked.new is None else look_at_data(asked.new, "--new", model, labelled=True)
    return _text(asked, model, task, anchors, old, new, hardware)


def _text(
    asked: Asked,
    model: ModelFacts,
    task: DataFacts,
    anchors: DataFacts,
    old: DataFacts | None,
    new: DataFacts | None,
    hardware: Hardware,
) -> str:
    lora = asked.preset == "lora"
    others = [each for each in (anchors, old, new) if each is not None]
    sizes = choose(model, task, others, anchors, lora, hardware)
    held_out = new is None and task.rows // HELD_OUT >= FEWEST_HELD_OUT
    lines = [
        *_head(asked, task),
        "",
        *_model(model, task, others, sizes, lora and hardware.gpu),
        *_adapter(lora),
        "",
        *_task(task, held_out),
        "",
        *_anchors(anchors, sizes),
        "",
        *_craft(sizes.batch),
        "",
        *_train(model, task, sizes, lora, hardware),
        "",
        *_evaluation(task, old, new, held_out, sizes),
        "",
        *_workers(hardware, model.parameters),
    ]
    return _aligned(lines)


def _model(model: ModelFacts, task: DataFacts, others: list[DataFacts], sizes: Sizes, frozen: bool) -> list[str]:
    chat = chat_wanted(model, [task, *others])
    how = "The model's own chat template writes the prompts." if chat else "Prompts are given to it as they are."
    lines = [
        f"# {model.parameters / 1e6:,.1f} M parameters. {how}",
        "model:",
        f"  kind: {model.kind}",
        f"  path: {_value(model.path)}",
        f"  max_length: {sizes.max_length} # tokens; {_longest(task, others)}",
    ]
    if frozen:
        lines.append("  dtype: bfloat16 # the frozen weights; the adapter is trained in float32")
    if chat:
        lines.append("  chat_template: true")
    if task.running_text:
        lines.append("  append_eos: false # running text has no end")
    if sizes.checkpointing:
        lines.append("  gradient_checkpointing: true # a batch of one does not fit into the memory otherwise")
    return lines


def _task(task: DataFacts, held_out: bool) -> list[str]:
    lines = [f"# The new skill: {task.rows} samples."]
    if held_out:
        lines = [
            f"# The new skill: {task.rows} samples, of which the last {HELD_OUT} % are held out for evaluation. If the",
            "# rows are sorted, e.g. by answer, name evaluation data with --new instead.",
        ]
    split = f"train[:{100 - HELD_OUT}%]" if held_out else None
    return [*lines, *_columns_note(task), f"task: {_flow(task.section(split))}"]


def _anchors(anchors: DataFacts, sizes: Sizes) -> list[str]:
    where = "[all] # every token of a text" if anchors.running_text else "[suffix] # the tokens of the teacher's answer"
    return [
        f"# The old skill: {anchors.rows} inputs; the teacher's own outputs are stored for them, no labels are read.",
        *_columns_note(anchors),
        "anchors:",
        f"  source: {_flow(anchors.section())}",
        f"  positions: {where} (docs/anchors.md)",
        f"  max_new_tokens: {sizes.new_tokens} # longest answer of the teacher that is stored",
    ]


def _head(asked: Asked, task: DataFacts) -> list[str]:
    name = re.sub(r"[^\w.-]+", "-", Path(task.path).name.partition(".")[0]).strip("-") or "run"
    return [
        "# Written by craft-ray init. Every key: docs/configuration.md. Next:",
        "#   craft-ray anchors build CONFIG && craft-ray train CONFIG --dry-run && craft-ray train CONFIG",
        f"name: {_value(name)}",
        "output_dir: runs",
    ]


def _adapter(lora: bool) -> list[str]:
    if not lora:
        return []
    return [
        "",
        "# LoRA in place of all weights (extra lora, docs/lora.md).",
        "adapter: {kind: lora, r: 8, alpha: 16, target_modules: all-linear}",
    ]


def _craft(batch: int, epsilon: float = 0.05) -> list[str]:
    return [
        "# The budget: how far hidden states at the anchors may move, in parts of the teacher's mean square. Less",
        "# keeps more of the old skill. keep: 0.95 states the kept part of the score instead (docs/keep.md).",
        "craft:",
        "  anchor_cache_dir: anchors # craft-ray anchors build writes it",
        f"  anchor_batch_size: {batch}",
        f"  epsilon_start: {epsilon}",
    ]


def _train(model: ModelFacts, task: DataFacts, sizes: Sizes, lora: bool, hardware: Hardware) -> list[str]:
    epochs = sizes.steps * sizes.batch / task.rows
    little = "" if epochs < EPOCHS + 1 else ", as there is little of it"
    lines = [
        f"# About {_bytes(sizes.memory)} of {hardware.in_words()}; --dry-run measures it.",
        "train:",
        f"  steps: {sizes.steps} # {epochs:.1f} times over the data{little}",
        f"  batch_size: {sizes.batch}",
    ]
    if sizes.accumulate > 1:
        lines.append(
            f"  accumulate: {sizes.accumulate} # passes of {sizes.batch // sizes.accumulate} fit into the memory"
        )
    trained = "an adapter" if lora else "a model of this size"
    lines += [
        f"  learning_rate: {_value(learning_rate(model, lora))} # usual for {trained}",
        f"  warmup_steps: {max(1, sizes.steps // 20)}",
    ]
    return [*lines, "  precision: bf16"] if hardware.gpu else lines


def _evaluation(
    task: DataFacts, old: DataFacts | None, new: DataFacts | None, held_out: bool, sizes: Sizes
) -> list[str]:
    sets = {}
    if old is not None:
        sets["old"] = _scored(old, old.section(), sizes)
    if new is not None:
        sets["new"] = _scored(new, new.section(), sizes)
    elif held_out:
        sets["new"] = _scored(task, task.section(f"train[{100 - HELD_OUT}%:]"), sizes)
    lines = ["# Scores before and after, on data that training never sees."]
    if old is None:
        lines.append("# Nothing measures the old skill yet: name labelled data of it with --old, or add it as old.")
    if not sets:
        return [*lines, "# evaluation: {new: {data: {path: ...}}}"]
    return [*lines, "evaluation:", *(f"  {skill}: {_flow(section)}" for skill, section in sets.items())]


def _scored(facts: DataFacts, section: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """How a set is scored: by choice if it has choices, by equality if answers are short, or by perplexity, with a few
    replies to read if there is something to reply to."""
    assert facts.columns is not None
    new_tokens = max(1, min(facts.response_tokens, sizes.new_tokens))
    if facts.columns.choices is not None:
        return {"metric": "choice", "data": section}
    if facts.answer_tokens <= SHORT_ANSWER and not facts.running_text:
        return {"metric": "exact_match", "data": section, "max_new_tokens": new_tokens}
    if facts.running_text:
        return {"metric": "perplexity", "data": section}
    return {"metric": "perplexity", "data": section, "replies": REPLIES, "max_new_tokens": new_tokens}


def _workers(hardware: Hardware, parameters: int) -> list[str]:
    if hardware.gpu:
        return ["workers: {num_workers: 1, use_gpu: true}"]
    if parameters < SMALL:
        return ["# A model of this size gains nothing from several threads.", "workers: {num_workers: 1}"]
    return [
        "# This machine has no GPU. Threads of the one worker; compare and sweep then run one at a time.",
        f"workers: {{num_workers: 1, cpus_per_worker: {hardware.cpus}, threads: {hardware.cpus}}}",
    ]


def _robot(asked: Asked, model: ModelFacts, task: DataFacts, anchors: DataFacts, hardware: Hardware) -> str:
    small = 0 < model.parameters < SMALL
    rate, usual = ("5.0e-4", "below 20 M parameters") if small else ("2.5e-5", "of billions of parameters")
    lines = [
        *_head(asked, task),
        "",
        f"model: {{kind: lerobot, path: {_value(asked.model)}}}",
        *_adapter(asked.preset == "lora"),
        "",
        f"# The new skill: {task.rows} frames of demonstrations.",
        f"task: {_flow(task.section())}",
        "",
        f"# The old skill: {anchors.rows} frames; the policy's own outputs are stored for them.",
        "anchors:",
        f"  source: {_flow(anchors.section())}",
        "  modes: [hidden] # at the positions that the policy's type has by default (docs/lerobot.md)",
        "",
        *_craft(16, 0.01),
        "",
        "train:",
        "  steps: 2000",
        "  batch_size: 16",
        f"  learning_rate: {rate} # usual for a policy {usual}",
        "  betas: [0.9, 0.95]",
        "  warmup_steps: 100",
        "",
        "# Success in a simulator, before and after (docs/lerobot.md), for example:",
        "# evaluation:",
        "#   old: {metric: success, rollout: {env: metaworld, task: drawer-close-v3, episodes: 40}}",
        "#   new: {metric: success, rollout: {env: metaworld, task: door-close-v3, episodes: 40}}",
        "",
        *_workers(hardware, model.parameters or SMALL),
    ]
    return _aligned(lines)


def _longest(task: DataFacts, others: list[DataFacts]) -> str:
    sets = [task, *others]
    longest = max(each.prompt_tokens + each.response_tokens for each in sets)
    counted, rows = sum(each.counted for each in sets), sum(each.rows for each in sets)
    return f"the longest of {'all' if counted == rows else counted} samples has {longest}"


def _columns_note(facts: DataFacts) -> list[str]:
    return ["# Each row is text to go on reading."] if facts.running_text else []


def _bytes(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _aligned(lines: list[str]) -> str:
    """Lines as a text, with the comments after values in one column."""
    pairs = [line.split(" # ", 1) if not line.startswith("#") else [line] for line in lines]
    width = max(len(pair[0].rstrip()) for pair in pairs if len(pair) == 2)
    return "".join(f"{pair[0].rstrip():<{width}} # {pair[1]}\n" if len(pair) == 2 else f"{pair[0]}\n" for pair in pairs)


def _value(value: Any) -> str:
    """A scalar as YAML."""
    return yaml.safe_dump(value, allow_unicode=True, width=10**6).removesuffix("...\n").strip()


def _flow(value: Any) -> str:
    """A mapping on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()
