"""The noise floor of a mode: what the storage's rounding makes of its loss, in the unit of that loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from craft_ray.anchors.reader import open_anchors
from craft_ray.retention.hidden import Hidden
from craft_ray.retention.token_ce import TokenCE
from tests.support.caches import built, cache_folder, prompts, teacher, text_experiment

LENGTHS = [3, 9, 1, 14, 6, 2, 30, 5]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("loss_type", ["relative_mse", "mse", "cosine", "l1"])
def test_the_untouched_student_is_below_the_floor_and_a_moved_one_above(
    loss_type: str, dtype: str, text_model: Path, tmp_path: Path
) -> None:
    config = text_experiment(text_model, prompts(tmp_path / "a.jsonl", LENGTHS), tmp_path, {"anchors.dtype": dtype})
    built(config)
    model, anchors, rows = teacher(config), open_anchors(cache_folder(config)), range(len(LENGTHS))
    mode = Hidden(model, anchors, anchors.identity.layers, anchors.identity.positions, loss_type)
    floor = mode.noise_floor(rows)
    with torch.no_grad():
        assert mode.loss(mode.batch(rows)).item() <= floor
        for parameter in model.module.parameters():
            parameter.mul_(1.05)
        assert mode.loss(mode.batch(rows)).item() > 10 * floor


def test_the_floor_follows_the_unit(text_model: Path, tmp_path: Path) -> None:
    """Known answer: rounding of relative mean square 1e-7, in the units of vectors of a known size."""
    config = text_experiment(text_model, prompts(tmp_path / "a.jsonl", LENGTHS), tmp_path)
    built(config)
    model, anchors, rows = teacher(config), open_anchors(cache_folder(config)), range(len(LENGTHS))
    layers, positions = anchors.identity.layers, anchors.identity.positions
    vectors = Hidden(model, anchors, layers, positions).teacher_vectors(rows)
    square = vectors.values_BLVD.double().square().mean(-1).transpose(1, 2)[vectors.valid_BV].mean().item()
    floors = {
        loss_type: Hidden(model, anchors, layers, positions, loss_type).noise_floor(rows)
        for loss_type in ("relative_mse", "mse", "cosine", "l1")
    }
    assert floors["relative_mse"] == 1e-7
    assert floors["mse"] == pytest.approx(1e-7 * square)
    assert floors["l1"] == pytest.approx((1e-7 * square) ** 0.5)
    assert floors["cosine"] == pytest.approx(0.5e-7 + 2**-23)
    assert TokenCE(model, anchors).noise_floor(rows) == 0.0
