"""Made-up run folders, as runs leave them, and the page that is written from them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from craft_ray.config import Experiment
from craft_ray.report.html import write_report
from craft_ray.run.folder import RunFolder
from craft_ray.run.scoring import ratio

STEPS = 12
EVIL = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }}"


def data_file(folder: Path, rows: int = 20) -> Path:
    """Held-out samples with a picture, a prompt that must be escaped, and a digit as the answer."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, format="PNG")
    path = folder / "old.parquet"
    table = {
        "id": [f"s{row}" for row in range(rows)],
        "image": [buffer.getvalue()] * rows,
        "prompt": [f"{EVIL} {row}" for row in range(rows)],
        "response": [str(row % 10) for row in range(rows)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    return path


def config_of(
    arm: str, seed: int, folder: Path, metric: str = "exact_match", mode: str | None = None, **craft: Any
) -> Experiment:
    """The config of a run. An arm with a `mode` is a variant."""
    eval_set: dict[str, Any] = {
        "metric": metric,
        "data": {
            "path": str(folder / "old.parquet"),
            "columns": {"id": "id", "image": "image", "prompt": "prompt", "response": "response"},
        },
    }
    if metric == "success":
        eval_set = {"metric": metric, "rollout": {"env": "metaworld", "task": "drawer-close-v3"}}
    settings = {"enabled": arm != "baseline", "anchor_cache_dir": str(folder / "cache"), "epsilon_start": 0.05} | craft
    if arm != "baseline":
        settings["retention_mode"] = mode or arm
    return Experiment.model_validate(
        {
            "name": "made-up",
            "variant": mode and arm,
            "seed": seed,
            "output_dir": str(folder),
            "model": {"path": "nowhere"},
            "task": {"path": "nowhere", "columns": {"response": "response"}},
            "craft": settings,
            "train": {"steps": STEPS},
            "evaluation": {"old": eval_set, "new": eval_set},
        }
    )


def log_of(config: Experiment) -> list[dict[str, Any]]:
    """A log with the gaps of a real one: K, no retention in plain fine-tuning, and a first cosine that is NaN."""
    records = []
    for step in range(1, STEPS + 1):
        retained = config.craft.enabled and (step - 1) % config.craft.retention_freq == 0
        records.append(
            {
                "step": step,
                "train/loss": 1 / step,
                "train/grad_norm": 1.0,
                "train/lr": 1e-4,
                "craft/retention_loss": 0.2 / step if retained else None,
                "craft/lambda": 1.0 + step if config.craft.enabled else None,
                "craft/epsilon": config.craft.epsilon_start if config.craft.enabled else None,
                "craft/grad_dot": 0.1 if retained else None,
                "craft/grad_cos": math.sin(step) if retained and step > 1 else None,
                "craft/conflict": math.sin(step) < -0.1 if retained else None,
                "perf/step_s": 0.1,
                "perf/data_s": 0.0,
            }
        )
    return records


def write_run(
    folder: Path,
    arm: str,
    seed: int,
    old: tuple[float, float] | None = (0.8, 0.4),
    new: tuple[float, float] | None = (0.1, 0.9),
    loss: float | None = 0.04,
    metric: str = "exact_match",
    predictions: bool = True,
    mode: str | None = None,
    replies: int = 0,
    **craft: Any,
) -> RunFolder:
    """A finished run with the given scores `(before, after)` and the given held-out retention loss."""
    config = config_of(arm, seed, folder, metric, mode, **craft)
    run = RunFolder(folder / f"{config.name}-{arm}-seed{seed}")
    run.begin(config, ["craft-ray", "train"])
    (run.path / "teacher.json").write_text('{"weights": "feedc0de"}')
    run.append_metrics(log_of(config))
    result: dict[str, Any] = {"name": config.name, "arm": arm, "seed": seed, "steps": STEPS, "seconds": 1.5}
    for skill, scores in (("old", old), ("new", new)):
        result[skill] = {"before": None, "after": None}
        if scores is not None:
            before, after = scores
            part = ratio(metric, after, before)
            result[skill] = {"metric": metric, "before": before, "after": after, "ratio": part, "samples": 20}
    if loss is None:
        result |= {"retention_loss": None, "epsilon": None, "feasible": None}
    else:
        epsilon = config.craft.epsilon_final
        result |= {
            "retention_mode": config.craft.retention_mode, "retention_loss": loss, "epsilon": epsilon,
            "violation": max(0.0, loss / epsilon - 1), "feasible": loss <= epsilon, "heldout_anchors": 50,
            "lambda": None if arm == "baseline" else 2.5, "cache": "cafe",
        }  # fmt: skip
    run.write_result(result)
    if predictions and old is not None:
        right = {"before": [True] * 20, "after": [arm != "baseline" or row < 3 for row in range(20)]}
        for when, answers in right.items():
            outcomes = [outcome(row, answer, metric, replies) for row, answer in enumerate(answers)]
            run.write_predictions(f"old_{when}", outcomes)
    return run


def outcome(row: int, right: bool, metric: str, replies: int = 0) -> dict[str, Any]:
    if metric in ("perplexity", "token_accuracy"):
        text = {"id": f"s{row}", "nll": 2.0 if right else 6.0 + row, "tokens": 2, "hits": 2 * right}
        return text | ({"prediction": f"{'yes' if right else 'no'} {row}"} if row < replies else {})
    answer = str(row % 10)
    return {
        "id": f"s{row}", "prompt": f"{EVIL} {row}", "response": answer,
        "prediction": answer if right else EVIL, "correct": right,
    }  # fmt: skip


def report(runs: Sequence[RunFolder], folder: Path, title: str = "A title") -> tuple[dict[str, Any], str]:
    """The report's numbers and its page, read back from disk."""
    target = folder / "report"
    content = write_report(runs, target, title=title, command="craft-ray compare run.yaml")
    assert json.loads((target / "result.json").read_text()) == content
    return content, (target / "report.html").read_text()


class Page(HTMLParser):
    """The content of a page: attributes that load or link, elements, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.shown: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.shown).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.shown.append(data)
