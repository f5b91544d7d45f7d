"""Three old skills under a multiplier each, under one shared multiplier, and under one fixed λ; and a step's price.

    python -m benchmarks.skills runs --out skills.jsonl [--seeds 0 1 2 3 4]
    python -m benchmarks.skills time

The digits model reads digits upright, inverted and mirrored; then it learns to read them through a rotated, inverted
camera. The skills have 220, 66 and 22 anchors. Budgets follow validation data, scores are on the test split. Runs that
are in the file already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from craft_pipelines.anchors import build
from sklearn.datasets import load_digits

from craft_ray.config import Experiment, parse_config
from craft_ray.examples import digits as example
from craft_ray.quiet import quiet_libraries
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train
from craft_ray.workers import OneWorker

ANCHORS = {"upright": 220, "inverted": 66, "mirrored": 22}
COLUMNS = {"id": "id", "image": "image", "prompt": "prompt", "response": "response"}
KEEP = 0.9
FIXED = (0.3, 1.0, 3.0, 10.0)
STEPS, EVERY = 150, 15


def write_data(folder: Path) -> None:
    """`SKILL_SPLIT.parquet` of the three cameras and the new one, the teacher's training data, and anchors."""
    pixels, labels_N = load_digits(return_X_y=True)
    scale = 255 / example.LARGEST_PIXEL
    upright_NHW = np.rint(pixels.reshape(-1, 8, 8) * scale).astype(np.uint8)
    cameras = {
        "upright": upright_NHW,
        "inverted": 255 - upright_NHW,
        "mirrored": upright_NHW[:, :, ::-1],
        "new": 255 - np.rot90(upright_NHW, axes=(1, 2)),
    }
    folder.mkdir(parents=True)
    for split, rows in example.split_indices(labels_N).items():
        for name, images_NHW in cameras.items():
            example.write_table(folder / f"{name}_{split}.parquet", name, rows, images_NHW, labels_N)
    for split in ("train", "val", "test"):
        tables = [pq.read_table(folder / f"{name}_{split}.parquet") for name in ANCHORS]
        pq.write_table(pa.concat_tables(tables), folder / f"all_{split}.parquet")


def task(path: Path) -> dict[str, Any]:
    return {"path": str(path), "columns": COLUMNS}


def scored(folder: Path, name: str) -> dict[str, Any]:
    return {"data": task(folder / f"{name}.parquet"), "max_new_tokens": 2}


def base(folder: Path, model: Path, training: Path, steps: int) -> dict[str, Any]:
    return {
        "name": "skills",
        "output_dir": str(folder),
        "model": {"kind": "vision_language", "path": str(model)},
        "task": task(training),
        "train": {"steps": steps, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 10, "check_minutes": 0},
        "workers": {"num_workers": 0},
    }


def problem(folder: Path) -> Experiment:
    """Data, teacher and cache, and the run with a multiplier for each skill."""
    data, model = folder / "data", folder / "model"
    if not data.exists():
        write_data(data)
        example.build_model(model)
        taught = base(folder, model, data / "all_train.parquet", 400) | {"craft": {"enabled": False}}
        run(parse_config(taught, "teacher"), folder / "teacher")
    tree = base(folder, folder / "teacher/checkpoints/last/model", data / "new_train.parquet", STEPS)
    tree |= {
        "anchors": {"positions": ["suffix"], "max_new_tokens": 2, "rows_per_shard": 256, "modes": ["hidden"]},
        "craft": {"anchor_cache_dir": str(folder / "anchors"), "anchor_batch_size": 48, "keep": KEEP},
        "validation": {"every": EVERY},
        "evaluation": {"new": scored(data, "new_test")},
        "skills": {
            name: {
                "anchors": {**task(data / f"{name}_train.parquet"), "limit": count},
                "validation": scored(data, f"{name}_val"),
                "evaluation": scored(data, f"{name}_test"),
            }
            for name, count in ANCHORS.items()
        },
    }
    config = parse_config(tree, "skills")
    build(config, say=lambda _: None)
    return config


def run(config: Experiment, path: Path) -> dict[str, Any]:
    folder = RunFolder(path)
    folder.begin(config, ["benchmarks.skills"])
    train(config, folder, OneWorker(), NullObserver())
    result = folder.finished()
    assert result is not None
    return result


def variants(config: Experiment, data: Path) -> dict[str, dict[str, Any]]:
    """The settings of each row. With one shared multiplier all anchors are one skill, with one loss and one score."""
    free = {f"skills.{name}.validation": None for name in ANCHORS} | {"craft.keep": None, "validation.every": 0}
    single = {"craft.lambda_lr": 0.0, "craft.use_grad_projection": False, "craft.lambda_floor": 0.0}
    pooled = {"skills": {}, "anchors": None, "evaluation.old": scored(data, "all_test")}
    return {
        "plain": {**free, "craft.enabled": False},
        "keep, a multiplier each": {},
        "keep, one multiplier": {**pooled, "validation.old": scored(data, "all_val")},
        "ε 0.05, a multiplier each": {**free, "craft.epsilon_start": 0.05},
        **{
            f"ε {eps:g}, one multiplier": {**pooled, "craft.keep": None, "craft.epsilon_start": eps}
            for eps in (0.1, 0.05, 0.02)
        },
        **{f"fixed λ {lam:g}": {**pooled, "craft.keep": None, **single, "craft.initial_lambda": lam} for lam in FIXED},
    }


def kept(folder: RunFolder, result: dict[str, Any]) -> dict[str, float]:
    """The part of the teacher's score that each skill kept."""
    if "skills" in result:
        return {name: result["skills"][name]["ratio"] for name in ANCHORS}
    before, after = (folder.read_predictions(f"old_{when}") for when in ("before", "after"))
    correct = {
        name: [sum(r["correct"] for r in records if r["id"].startswith(name)) for records in (before, after)]
        for name in ANCHORS
    }
    return {name: new / old for name, (old, new) in correct.items()}


def runs(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.keep_in or Path(scratch)).absolute()
        config = problem(folder)
        done = {(row["variant"], row["seed"]) for row in rows_of(arguments.out)}
        for seed in arguments.seeds:
            for variant, changes in variants(config, folder / "data").items():
                if (variant, seed) in done:
                    continue
                path = Path(scratch) / f"{seed}-{len(list(Path(scratch).iterdir()))}"
                result = run(config.changed({**changes, "seed": seed}), path)
                row = {"variant": variant, "seed": seed, "new": result["new"]["after"]}
                row["kept"] = kept(RunFolder(path), result)
                row["lambda"] = {name: found.get("lambda") for name, found in result.get("skills", {}).items()}
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                print(json.dumps(row, ensure_ascii=False), flush=True)
    print(table(rows_of(arguments.out)))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """A line per variant: means over seeds, the least of any seed, and how often every skill met its target."""
    lines = [f"| | {' | '.join(ANCHORS)} | new | all three kept {KEEP:g} |", "|---|" + "---|" * (len(ANCHORS) + 2)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        cells = []
        for values in [[row["kept"][name] for row in own] for name in ANCHORS] + [[row["new"] for row in own]]:
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        met = sum(min(row["kept"].values()) >= KEEP for row in own)
        lines.append(f"| {variant} | {' | '.join(cells)} | {met}/{len(own)} |")
    return "\n".join(lines)


def step_time(arguments: argparse.Namespace) -> None:
    """Seconds of a step with three skills over those with one, at the same anchor batch, in turns."""
    with tempfile.TemporaryDirectory() as scratch:
        config = problem((arguments.keep_in or Path(scratch)).absolute())
        long = {"train.steps": 10_000, "train.log_every": 10_000}
        several = config.changed(variants(config, Path(scratch))["ε 0.05, a multiplier each"] | long)
        one = several.changed({"skills": {}, "anchors": None})
        opened = {
            name: Run(chosen, RunFolder(Path(scratch) / name), OneWorker(), NullObserver())
            for name, chosen in (("three", several), ("one", one))
        }
        for each in opened.values():
            each.loop(until=20)
        ratios = []
        for turn in range(20):
            seconds = {}
            for name in opened if turn % 2 else reversed(opened):
                started = time.perf_counter()
                opened[name].loop(until=opened[name].step + 10)
                seconds[name] = time.perf_counter() - started
            ratios.append(seconds["three"] / seconds["one"])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"a step with three skills over one: {middle:.3f} [{low:.3f}, {high:.3f}], median and quartiles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["runs", "time"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("skills.jsonl"))
    parser.add_argument("--keep-in", type=Path, default=None, help="keep data and teacher here")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    if arguments.what == "time":
        step_time(arguments)
    else:
        runs(arguments)


if __name__ == "__main__":
    main()
