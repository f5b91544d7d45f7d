"""How often a stated part of the old skill is kept, and at what cost: `craft.keep` against one fixed λ and one fixed ε.

    craft-ray demo --out craft-demo          # makes teacher and data; --preset text for the other problem
    python -m benchmarks.keep craft-demo --anchors 44 --out keep.jsonl
    python -m benchmarks.keep craft-text --preset text --out keep.jsonl

The budget follows validation data; scores are on the test split. Runs that are in the file already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.method_choices import prepared, run
from craft_ray.config import CraftConfig, load_config
from craft_ray.quiet import quiet_libraries

TARGETS = {"digits": (0.90, 0.95, 0.99), "text": (0.70, 0.75, 0.80)}
"""The text problem's scores are perplexities: a quarter more of it is a large loss."""
POSITIONS = {"digits": "suffix", "text": "all"}
EVERY = {"digits": 15, "text": 20}
SINGLE: dict[str, dict[str, Any]] = {
    "plain": {"craft.enabled": False},
    **{f"fixed λ {lam:g}": {"craft.lambda_lr": 0.0, "craft.initial_lambda": lam} for lam in (0.3, 1.0, 3.0, 10.0)},
    **{f"fixed ε {eps:g}": {"craft.epsilon_start": eps} for eps in (0.1, 0.05, 0.02, 0.01)},
}
"""One number for all problems, without a floor under λ."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--preset", choices=TARGETS, default="digits")
    parser.add_argument("--anchors", type=int, default=None, help="use only this many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("keep.jsonl"))
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    problem = arguments.preset if arguments.anchors is None else f"{arguments.preset}, {arguments.anchors} anchors"
    with tempfile.TemporaryDirectory() as scratch:
        variants = dict(SINGLE)
        floor = CraftConfig().lambda_floor
        variants |= {
            f"keep {target:g}": {"craft.keep": target, "craft.lambda_floor": floor}
            for target in TARGETS[arguments.preset]
        }
        done = {(row["problem"], row["variant"], row["seed"]) for row in rows_of(arguments.out)}
        config = problem_of(arguments.demo.absolute(), Path(scratch), arguments.preset, arguments.anchors)
        for variant, changes in variants.items():
            for seed in arguments.seeds:
                if (problem, variant, seed) in done:
                    continue
                result = run(config, changes, seed, Path(scratch) / f"{variant}-{seed}")
                row = {"problem": problem, "variant": variant, "seed": seed, "old": result["old"]["ratio"]}
                row |= {"new": result["new"]["after"], "lambda": result["lambda_last_quarter"]}
                row |= {"certificate": result.get("certificate"), "seconds": result["seconds"]}
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print(table(rows_of(arguments.out), problem, TARGETS[arguments.preset]))


def problem_of(demo: Path, scratch: Path, preset: str, anchors: int | None) -> Any:
    """The demo's problem: validation data steer the budget, test data are scored."""
    shipped = load_config(Path(__file__).parent.parent / f"pipelines/configs/demo_{preset}.yaml", base=demo)
    config = prepared(demo, scratch, preset, {} if anchors is None else {"anchors.source.limit": anchors})
    changes: dict[str, Any] = {"validation.every": EVERY[preset], "craft.positions": [POSITIONS[preset]]}
    changes["validation.new"] = None
    for skill in ("old", "new"):
        changes[f"evaluation.{skill}"] = shipped.model_dump()["evaluation"][skill]
    return config.changed(changes)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]], problem: str, targets: tuple[float, ...]) -> str:
    """A line per variant: means over seeds, and in how many runs each target was met."""
    lines = [f"| {problem} | old kept | new | {' | '.join(f'met {target:g}' for target in targets)} |"]
    for variant in dict.fromkeys(row["variant"] for row in rows if row["problem"] == problem):
        runs = [row for row in rows if row["problem"] == problem and row["variant"] == variant]
        old, new = [row["old"] for row in runs], [row["new"] for row in runs]
        met = " | ".join(f"{sum(value >= target for value in old)}/{len(old)}" for target in targets)
        lines.append(
            f"| {variant} | {statistics.mean(old):.3f} ({min(old):.3f} to {max(old):.3f}) | "
            f"{statistics.mean(new):.3f} ({min(new):.3f} to {max(new):.3f}) | {met} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
