"""Samples with lists of images, cut into different numbers of tiles, through every stage."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from craft_pipelines.anchors import build

from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.reader import open_anchors
from craft_ray.config import Experiment, parse_config
from craft_ray.data.source import open_source
from craft_ray.errors import DataError
from craft_ray.models import load_model
from craft_ray.models.capabilities import token_model
from craft_ray.retention.reforward import reforward
from tests.support import tiling
from tests.support.caches import json_lines
from tests.support.runs import trained
from tests.support.tiling import png

SIZES = [[(8, 8)], [(24, 8), (8, 8)], [(8, 20), (16, 16), (8, 8)], [], [(16, 16), (30, 8)]]


def rows(count: int) -> list[dict[str, object]]:
    """Rows with 0 to 3 images."""
    found = []
    for row in range(count):
        data = [png(width, height, row) for width, height in SIZES[row % len(SIZES)]]
        uris = ["data:image/png;base64," + base64.b64encode(image).decode() for image in data]
        found.append({"image": uris, "prompt": "<image>" * len(uris) + f"row {row}?", "response": f"{len(uris)}."})
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiling.build("idefics3", tmp_path_factory.mktemp("model") / "idefics3")


@pytest.fixture
def experiment(model: Path, tmp_path: Path) -> Experiment:
    columns = {"image": "image", "response": "response"}
    old, new = (json_lines(tmp_path / f"{name}.jsonl", rows(count)) for name, count in (("old", 7), ("new", 8)))
    tree = {
        "output_dir": str(tmp_path / "runs"),
        "model": {"kind": "vision_language", "path": str(model)},
        "task": {"path": str(new), "columns": columns},
        "anchors": {
            "source": {"path": str(old), "columns": {"image": "image"}},
            "positions": ["masked_mean", "text_last", "suffix"],
            "max_new_tokens": 3,
        },
        "craft": {"anchor_cache_dir": str(tmp_path / "anchors"), "anchor_batch_size": 4},
        "train": {"steps": 2, "batch_size": 4},
        "evaluation": {
            "old": {"data": {"path": str(old), "columns": columns}, "metric": "perplexity"},
            "new": {"data": {"path": str(new), "columns": columns}, "metric": "exact_match", "max_new_tokens": 3},
        },
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test")


def test_lists_of_images_through_every_stage(experiment: Experiment, tmp_path: Path) -> None:
    build(experiment, say=lambda _: None)
    folder = tmp_path / "anchors"
    manifest = read_manifest(folder)
    assert manifest.identity.inputs == "images"
    assert experiment.anchors is not None
    assert experiment.anchors.source is not None
    source, anchors = open_source(experiment.anchors.source, "anchors.source"), open_anchors(folder)
    assert [anchors.sample(row).images for row in range(7)] == [sample.images for sample in source]
    assert [anchors.sample(row).image for row in range(7)] == [sample.image for sample in source]
    assert [anchors.sample(row).prompt for row in range(7)] == [sample.prompt for sample in source]
    teacher = token_model(load_model(experiment.model, "fp32"))
    assert anchors.suffix(2) == teacher.generate([teacher.preprocess(source[2])], 3)[0]
    assert reforward(folder, manifest, experiment, teacher, 7).rows == 7

    run = trained(experiment, tmp_path / "run")
    result = run.finished()
    assert result is not None
    assert result["steps"] == 2
    assert result["retention_loss"] is not None
    assert {record["id"] for record in run.read_predictions("new_after")} == {f"{row:08d}" for row in range(8)}


def test_a_bad_row_is_found_before_the_first_step(experiment: Experiment, tmp_path: Path) -> None:
    bad = rows(8)
    bad[5]["prompt"] = "<image><image> twice"
    json_lines(tmp_path / "new.jsonl", bad)
    build(experiment, say=lambda _: None)
    with pytest.raises(DataError, match=r"task: .*new\.jsonl, row 5: its prompt has <image> 2 times, but the row"):
        trained(experiment, tmp_path / "run")
