"""What each choice of the method keeps, on the problem of a demo, with training runs of the product.

    craft-ray demo --out craft-demo          # makes teacher and data
    python benchmarks/method_choices.py craft-demo --out choices.json [--seeds 0 1 2] [--only K gate]
    craft-ray demo --preset text --out craft-text
    python benchmarks/method_choices.py craft-text --preset text --only position token_ce fixed logits

Scores are on the validation split: choices are made on it, and the demo reports the test split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from craft_pipelines.anchors import build

from craft_ray.anchors.manifest import SHARDS, read_manifest
from craft_ray.anchors.matching import select
from craft_ray.anchors.schema import hidden_column, log_probs_column, tokens_column
from craft_ray.config import Experiment, load_config
from craft_ray.config.loading import read_yaml
from craft_ray.quiet import quiet_libraries
from craft_ray.run.folder import RunFolder, environment
from craft_ray.run.observers import NullObserver
from craft_ray.run.scoring import ratio
from craft_ray.run.training import train
from craft_ray.storage.paths import storage_path
from craft_ray.workers import OneWorker

POSITIONS = {
    "digits": ("text_last", "vision_mean", "masked_mean", "last_token", "first_token", "every_4", "all", "suffix"),
    "text": ("masked_mean", "last_token", "first_token", "every_8", "every_4", "all", "suffix"),
}
LOGITS = {"digits": ("suffix", "text_last"), "text": ("all", "every_4", "suffix")}
"""Positions of mode `logits`; the first is compared in more detail."""
FIXED = {"craft.lambda_lr": 0.0}

COMMON: dict[str, dict[str, Any]] = {
    "plain": {"craft.enabled": False},
    "hidden (shipped)": {},
    **{f"gate {gate}": {"craft.projection_gate": gate} for gate in ("always", "violated")},
    "gate off": {"craft.use_grad_projection": False},
    **{f"K = {k}": {"craft.retention_freq": k} for k in (2, 5, 10)},
    "K = 5, unbounded violation": {"craft.retention_freq": 5, "craft.violation_clip": None},
    "K = 5, budget 0.15": {"craft.retention_freq": 5, "craft.epsilon_start": 0.15},
    "K = 5, 400 steps": {"craft.retention_freq": 5, "train.steps": 400, "train.learning_rate": 2e-3},
    **{f"merge {mode}": {"craft.projection_mode": mode} for mode in ("equal", "task_priority")},
    **{f"loss {loss}": {"craft.loss_type": loss, "craft.epsilon_start": 0.1} for loss in ("cosine",)},
    **{f"fixed λ {lam:g}": {**FIXED, "craft.initial_lambda": lam} for lam in (0.1, 1.0, 10.0)},
    **{f"budget {eps:g}": {"craft.epsilon_start": eps} for eps in (0.02, 0.05, 0.1, 0.2)},
    **{
        f"cosine budget {start:g} to 0.05": {
            "craft.epsilon_schedule": "cosine",
            "craft.epsilon_start": start,
            "craft.epsilon_end": 0.05,
        }
        for start in (0.2, 0.5)
    },
    "PI term": {"craft.lambda_kp": 3.0},
    **{f"floor {floor:g}": {"craft.lambda_floor": floor} for floor in (0.2, 0.35, 0.5, 0.9)},
    "budget 0.1, position suffix": {"craft.epsilon_start": 0.1, "craft.positions": ["suffix"]},
    "budget 0.1, positions text_last and suffix": {
        "craft.epsilon_start": 0.1,
        "craft.positions": ["text_last", "suffix"],
    },
    "token_ce 0.1": {"craft.retention_mode": "token_ce", "craft.epsilon_start": 0.1},
    "token_ce 0.2": {"craft.retention_mode": "token_ce", "craft.epsilon_start": 0.2},
}


CONFIGS = Path(__file__).parent.parent / "pipelines" / "configs"


def of_logits(position: str, k: int = 32, temperature: float = 1.0, **craft: Any) -> dict[str, Any]:
    """Settings of a run in mode `logits`, with a cache of its own."""
    return {
        "anchors.modes": ["logits"],
        "anchors.logits": {"k": k, "temperature": temperature, "positions": [position]},
        "craft.retention_mode": "logits",
        "craft.positions": None,
        "craft.epsilon_start": 0.05,
        **{f"craft.{name}": value for name, value in craft.items()},
    }


def variants(preset: str) -> dict[str, dict[str, Any]]:
    """The name and the changed settings of every run."""
    best, *others = LOGITS[preset]
    rule = {
        f"original rule{of}, position {p}": {**original_rule(), "craft.positions": [p], "craft.layers": [-2], **measure}
        for p in ("vision_mean", "suffix")
        if p in POSITIONS[preset]
        for of, measure in (("", {}), (" with the cosine", {"craft.conflict_measure": "cosine"}))
    }
    return (
        COMMON
        | {f"position {p}": {"craft.positions": [p]} for p in POSITIONS[preset]}
        | rule
        | {f"logits {best}, budget {eps:g}": of_logits(best, epsilon_start=eps) for eps in (0.02, 0.05, 0.1, 0.2)}
        | {
            f"logits {best}, fixed λ {lam:g}": of_logits(best, lambda_lr=0.0, initial_lambda=lam)
            for lam in (0.1, 1.0, 10.0)
        }
        | {f"logits {best}, k = {k}": of_logits(best, k) for k in (1, 4, 16)}
        | {f"logits {best}, temperature {t:g}": of_logits(best, temperature=t) for t in (2.0,)}
        | {f"logits {other}": of_logits(other) for other in others}
    )


def original_rule() -> dict[str, Any]:
    """The settings of the earlier scripts' rule, on this problem's cache, held-out anchors and steps."""
    craft = read_yaml((CONFIGS / "original_rule.yaml").read_text())["craft"]
    kept = ("anchor_cache_dir", "anchor_batch_size", "anchor_holdout", "epsilon_decay_steps")
    return {f"craft.{key}": value for key, value in craft.items() if key not in kept}


def prepared(demo: Path, scratch: Path, preset: str, others: Mapping[str, Any] | None = None) -> Experiment:
    """The demo's comparison on validation data, with a cache that holds every position."""
    config = load_config(CONFIGS / f"demo_{preset}.yaml", base=demo)
    changes: dict[str, Any] = {
        "workers.num_workers": 0,
        "craft.anchor_cache_dir": str(scratch / "anchors"),
        "craft.lambda_floor": 0.0,
        "anchors.positions": list(POSITIONS[preset]),
        "craft.positions": list(config.anchors.positions or ()) if config.anchors else None,
        "output_dir": str(scratch),
    }
    for skill in ("old", "new"):
        changes[f"evaluation.{skill}.data.path"] = str(demo / "data" / f"{skill}_val.parquet")
    config = config.changed(changes | dict(others or {}))
    build(config)
    return config


def with_cache(config: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The config with a run's changes, and with a cache of its own if they change what is stored."""
    own = {key: value for key, value in changes.items() if key.startswith("anchors.")}
    config = config.changed(changes)
    if own:
        name = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
        config = config.changed({"craft.anchor_cache_dir": f"{config.craft.anchor_cache_dir}-{name}"})
        build(config, say=lambda _: None)
    return config


def anchor_bytes(config: Experiment) -> float:
    """Bytes of the cache that a run's mode reads, for each anchor."""
    folder = storage_path(config.craft.anchor_cache_dir or "")
    identity, mode = read_manifest(folder).identity, config.craft.retention_mode
    _, positions = select(folder, identity, config)
    columns = {
        "hidden": [hidden_column(p) for p in positions],
        "logits": [column(p) for p in positions for column in (tokens_column, log_probs_column)],
        "token_ce": [],
    }[mode]
    if mode == "token_ce" or "suffix" in positions:
        columns.append("suffix")
    return float(pq.read_table(str(folder / SHARDS), columns=columns).nbytes / identity.rows)


def run(config: Experiment, changes: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """One run; its result, with the course of lambda."""
    config = with_cache(config, {**changes, "seed": seed})
    place = RunFolder(folder)
    place.begin(config, ["benchmarks/method_choices.py"])
    train(config, place, OneWorker(), NullObserver())
    result = place.finished()
    assert result is not None
    lambdas = [record["craft/lambda"] or 0.0 for record in place.read_metrics()]
    conflicts = sum(bool(record["craft/conflict"]) for record in place.read_metrics())
    return result | {
        "lambda_max_seen": max(lambdas),
        "lambda_last_quarter": statistics.mean(lambdas[-len(lambdas) // 4 :]),
        "lambda_cap": config.craft.lambda_max,
        "conflicts": conflicts,
        "anchor_bytes": anchor_bytes(config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--preset", choices=POSITIONS, default="digits")
    parser.add_argument("--out", type=Path, default=Path("method_choices.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--anchors", type=int, default=None, help="use only this many")
    parser.add_argument("--only", nargs="*", default=[], help="prefixes of the variants' names")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    table: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        fewer = {} if arguments.anchors is None else {"anchors.source.limit": arguments.anchors}
        config = prepared(arguments.demo.absolute(), Path(scratch), arguments.preset, fewer)
        wanted = ("plain", *arguments.only) if arguments.only else ("",)  # all ratios are relative to plain
        for name, changes in variants(arguments.preset).items():
            if not name.startswith(wanted):
                continue
            rows = [run(config, changes, seed, Path(scratch) / f"{name}-{seed}") for seed in arguments.seeds]
            table[name] = rows
            print(row_text(name, rows, table["plain"]), flush=True)
    arguments.out.write_text(json.dumps({"environment": environment([]), "runs": table}, indent=1))


def row_text(name: str, rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> str:
    """One line of the table: the values of all seeds side by side."""
    old = [row["old"]["ratio"] for row in rows]
    new = [
        ratio(row["new"]["metric"], row["new"]["after"], base["new"]["after"]) or 0.0
        for row, base in zip(rows, plain, strict=True)
    ]

    def listed(values: list[float], form: str) -> str:
        return " ".join(format(value, form) for value in values)

    held = [row["retention_loss"] for row in rows]
    return (
        f"| {name} | {listed(old, '.3f')} | {listed(new, '.3f')} | {listed(held, '.3f')} | "
        f"{listed([h / row['epsilon'] for h, row in zip(held, rows, strict=True)], '.2f')} | "
        f"{listed([row['lambda_last_quarter'] for row in rows], '.1f')} | "
        f"{listed([row['lambda_max_seen'] for row in rows], '.1f')} | "
        f"{listed([row['conflicts'] for row in rows], 'd')} | "
        f"{rows[0]['anchor_bytes']:.0f} | {statistics.median(row['seconds'] for row in rows):.0f} |"
    )


if __name__ == "__main__":
    main()
