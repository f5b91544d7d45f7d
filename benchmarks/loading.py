"""Decoding images alongside the computation: `anchors.readers` in a build, `train.loader_workers` in a run.

Images are JPEGs of 640 x 480, for a PaliGemma-shaped model of 224 pixels on one thread. A build is measured as the
difference of a small and a large one, so that starting processes and loading models cancel out; a build of texts shows
what the stages cost when there is nothing to decode. A run is measured by the share of its steps' time in which it
waits for data, after the first steps, with every sample new.

Targets: a build of images 1.6 times as fast with a reader; at most 2 % of a step waited.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from craft_pipelines.anchors import build
from PIL import Image
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from benchmarks.harness import WALL, Ratio, Report, Row, arguments, one_thread
from benchmarks.texts import experiment, samples, write_model, write_samples
from benchmarks.workload import Shape
from craft_ray.anchors.build import identity_of, prepare
from craft_ray.anchors.teacher import Teacher
from craft_ray.config import Experiment, parse_config
from craft_ray.data.source import open_source
from craft_ray.examples.digits import build_processor
from craft_ray.models import load_model
from craft_ray.quiet import quiet_libraries
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker

PICTURE = (640, 480)
PIXELS, PATCH = 224, 28
TEXT = Shape(width=128, layers=4, inner=256, heads=4, vocabulary=512, head_size=32)
WARM_UP = 5
"""Steps of a run before those that are measured: the loaders start."""


def write_image_model(folder: Path, width: int, layers: int) -> Path:
    """A PaliGemma with random weights whose vision tower decides what a row costs."""
    quiet_libraries()
    processor = build_processor()
    processor.image_processor.size = {"height": PIXELS, "width": PIXELS}
    processor.image_processor.image_seq_length = processor.image_seq_length = (PIXELS // PATCH) ** 2
    tokenizer = processor.tokenizer
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            image_size=PIXELS,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=GemmaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
            **special,
        ),
        image_token_index=processor.image_token_id,
        vocab_size=len(tokenizer),
        hidden_size=128,
        projection_dim=128,
        **special,
    )
    torch.manual_seed(0)
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_pictures(path: Path, count: int) -> Path:
    """Pictures with the detail of a photograph: noise on a coarse grid, enlarged."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize(PICTURE, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        pictures.append(stream.getvalue())
    table = {
        "id": [f"{i:06d}" for i in range(count)],
        "image": pictures,
        "prompt": ["what digit is it"] * count,
        "response": [str(i % 10) for i in range(count)],
    }
    pq.write_table(pa.table(table), path)
    return path


def image_experiment(folder: Path, model: Path, data: Path) -> Experiment:
    columns = {"id": "id", "image": "image", "prompt": "prompt"}
    tree: dict[str, Any] = {
        "name": "loading",
        "output_dir": str(folder / "runs"),
        "model": {"kind": "vision_language", "path": str(model), "max_length": 512},
        "task": {"path": str(data), "columns": {**columns, "response": "response"}},
        "anchors": {
            "source": {"path": str(data), "columns": columns},
            "modes": ["hidden"],
            "positions": ["vision_mean"],
            "rows_per_shard": 256,
        },
        "craft": {"anchor_cache_dir": str(folder / "cache"), "enabled": False},
        "train": {"steps": 1, "check_minutes": 0},
    }
    return parse_config(tree, "benchmark")


def seconds(config: Experiment, folder: Path, rows: int, readers: int) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    changed = config.changed({"anchors.source.limit": rows, "anchors.readers": readers, "train.check_minutes": 0})
    start = time.perf_counter()
    build(changed, say=lambda _: None)
    return time.perf_counter() - start


def parts(config: Experiment, rows: int) -> tuple[float, float]:
    """Seconds to read and preprocess a row, and to compute and write it."""
    assert config.anchors is not None
    model = load_model(config.model, "fp32")
    source = open_source(config.anchors.source, "anchors.source")  # type: ignore[arg-type]
    teacher = Teacher(model, identity_of(config, model, source).schema, config.anchors)
    started = time.perf_counter()
    anchors = prepare(model, source, range(rows))
    read = time.perf_counter()
    teacher.table(anchors)
    return (read - started) / rows, (time.perf_counter() - read) / rows


def measure_build(
    report: Report, what: str, config: Experiment, folder: Path, sizes: tuple[int, int], rounds: int, target: str | None
) -> None:
    few, many = sizes
    slopes: dict[int, list[float]] = {0: [], 1: []}
    seconds(config, folder, few, 0)  # starts Ray, and reads every file once
    for round_ in range(rounds):
        for readers in (0, 1) if round_ % 2 else (1, 0):
            first, second = (seconds(config, folder, rows, readers) for rows in sizes)
            slopes[readers].append((second - first) / (many - few))
    ratio = Ratio.of([without / with_ for without, with_ in zip(slopes[0], slopes[1], strict=True)])
    reading, computing = parts(config, min(few, 128))
    bound = (reading + computing) / max(reading, computing)
    note = f"{reading * 1e3:.1f} ms to read and {computing * 1e3:.1f} ms to compute a row: at most {bound:.2f}"
    report.add(Row.of(f"build of {what}: no readers / one reader", ratio, target, note))


def measure_run(report: Report, config: Experiment, folder: Path, steps: int, batch: int, rounds: int) -> None:
    shares: dict[int, list[float]] = {0: [], 1: []}
    note = ""
    for round_ in range(rounds):
        for loaders in shares:
            path = folder / f"run-{round_}-{loaders}"
            changes = {
                "train.steps": steps,
                "train.batch_size": batch,
                "train.loader_workers": loaders,
                "train.keep_checkpoints": 0,
                "craft.anchor_cache_dir": None,
                "workers.num_workers": 0,
            }
            run = RunFolder(path)
            changed = config.changed(changes)
            run.begin(changed, ["benchmark"])
            train(changed, run, OneWorker(), NullObserver())
            records = run.read_metrics()[WARM_UP:]
            waited = sum(record["perf/data_s"] for record in records)
            spent = sum(record["perf/step_s"] for record in records)
            shares[loaders].append(waited / spent)
            note = f"{spent / len(records):.2f} s a step"
    for loaders, found in shares.items():
        target = "<= 0.02" if loaders else None
        report.add(Row.of(f"share of a step waited for data, loader_workers {loaders}", Ratio.of(found), target, note))


def main() -> None:
    options = arguments(__doc__, rounds=3).parse_args()
    one_thread()
    report = Report("loading", WALL.name, judge=not options.tiny)
    tiny = options.tiny
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = (32, 64) if tiny else (512, 1536)
        model = write_image_model(folder / "model", *((32, 1) if tiny else (448, 7)))
        config = image_experiment(folder, model, write_pictures(folder / "pictures.parquet", sizes[1]))
        if tiny:
            config = config.changed({"anchors.rows_per_shard": 16})
        measure_build(report, "images", config, folder / "cache", sizes, 1 if tiny else options.rounds, ">= 1.6")
        steps, batch = (WARM_UP + 3, 4) if tiny else (60, 8)
        small = config.changed({"model.path": str(write_image_model(folder / "small model", 64, 2))})
        measure_run(report, small, folder, steps, batch, 1 if tiny else options.rounds)
        shutil.rmtree(folder / "cache")
        many = 256 if tiny else 8192
        words = write_samples(folder / "texts.parquet", samples([32] * many, TEXT))
        text = experiment(
            folder / "cache",
            write_model(folder / "text model", TEXT),
            words,
            **{"anchors.modes": ["hidden"], "anchors.positions": ["last_token"], "workers.num_workers": 1},
        )
        measure_build(report, "texts", text, folder / "cache", (many // 8, many), 1 if tiny else options.rounds, None)
    report.finish(options.json)


if __name__ == "__main__":
    main()
