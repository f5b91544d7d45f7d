"""Vectors in a cache are what one anchor alone gives, however anchors were batched, packed and padded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from craft_pipelines.anchors import build
from torch import Tensor

from craft_ray.anchors.ragged import Ragged, write_ragged
from craft_ray.anchors.reader import open_anchors
from craft_ray.config import Experiment, Precision
from craft_ray.errors import ConfigError
from craft_ray.method.pooling import is_mean, token_positions
from craft_ray.models.base import Features, Model
from craft_ray.retention.constraints import open_mode
from craft_ray.retention.hidden import Hidden
from tests.support.caches import built, cache_folder, prompts, table, teacher, text_experiment

LENGTHS = [3, 9, 1, 14, 6, 2, 30, 5, 8, 12, 4, 7, 1, 22, 3, 10]
POSITIONS = ["all", "every_4", "suffix", "masked_mean", "last_token", "first_token", "text_last"]
LAYERS = [0, 2, 3]


def experiment(model: Path, folder: Path, pack_tokens: int | None, precision: Precision = "fp32") -> Experiment:
    source = prompts(folder / "anchors.jsonl", LENGTHS)
    return text_experiment(
        model,
        source,
        folder / str(pack_tokens),
        {
            "anchors.positions": POSITIONS,
            "anchors.layers": LAYERS,
            "anchors.dtype": "float32",
            "anchors.batch_size": 5,
            "anchors.pack_tokens": pack_tokens,
            "train.precision": precision,
        },
    )


@torch.no_grad()
def alone(model: Model, features: Features, position: str) -> Tensor:
    """The vectors [n, L * D] of one unpadded sequence, taken from transformers' hidden states one by one."""
    with model.autocast():
        states = model.module.model(features.tokens["input_ids"][None], output_hidden_states=True).hidden_states
    hidden_SLD = torch.stack([states[k][0] for k in LAYERS], 1).float()
    chosen = [hidden_SLD[token] for token in token_positions(features.layout, position)]
    vectors = [torch.stack(chosen).mean(0)] if is_mean(position) else chosen
    return torch.stack(vectors).flatten(1)


def distance(ours: np.ndarray | Sequence, theirs: Tensor) -> float:
    """Relative mean square of the vector that differs most."""
    left = torch.from_numpy(np.array(ours, np.float32))
    assert left.shape == theirs.shape
    return ((left - theirs).square().sum(1) / theirs.square().sum(1)).max().item()


@pytest.mark.parametrize("pack_tokens", [0, None, 60, 1])
def test_cached_vectors_are_those_of_each_anchor_alone(
    pack_tokens: int | None, text_model: Path, tmp_path: Path
) -> None:
    config = experiment(text_model, tmp_path, pack_tokens)
    built(config)
    rows = table(cache_folder(config)).to_pylist()
    anchors, model = open_anchors(cache_folder(config)), teacher(config)
    for number, row in enumerate(rows):
        features = model.preprocess(anchors.sample(number), row["suffix"])
        for position in POSITIONS:
            assert distance(row[f"hidden_{position}"], alone(model, features, position)) < 1e-10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_padded_and_packed_teachers_and_the_student_agree(
    precision: Precision, text_model: Path, tmp_path: Path
) -> None:
    bound = {"fp32": 1e-10, "bf16": 2e-3}[precision]
    for pack_tokens in (0, 2048):
        config = experiment(text_model, tmp_path, pack_tokens, precision)
        built(config)
        model = teacher(config)
        student = open_mode(config, model, model.weights_fingerprint())
        assert isinstance(student, Hidden)
        batch = student.batch(range(len(LENGTHS)))
        with torch.no_grad():
            ours = student.student_vectors(batch)
        assert torch.equal(ours.valid_BV, batch.teacher.valid_BV)
        apart = (ours.values_BLVD.float() - batch.teacher.values_BLVD).square().sum(-1)
        relative = apart / batch.teacher.values_BLVD.square().sum(-1)
        assert relative.transpose(1, 2)[ours.valid_BV].max() < bound
        student.check_untouched(range(len(LENGTHS)), 4)


def test_suffix_tokens_are_those_that_each_prompt_alone_generates(text_model: Path, tmp_path: Path) -> None:
    config = experiment(text_model, tmp_path, None)
    built(config)
    anchors, model = open_anchors(cache_folder(config)), teacher(config)
    for row in range(len(LENGTHS)):
        assert anchors.suffix(row) == model.generate([model.preprocess(anchors.sample(row))], 3)[0]


def test_the_build_says_whether_it_packs(text_model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    build(experiment(text_model, tmp_path, None), say=lines.append)
    build(experiment(text_model, tmp_path, 0), say=lines.append)
    assert [line for line in lines if line.startswith("forward passes")] == [
        "forward passes on packs of up to 2048 tokens",
        "forward passes on batches of 5 anchors, padded",
    ]


def test_a_model_that_cannot_be_packed_is_padded_unless_packs_are_requested(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from craft_ray.anchors.forward import tokens_per_pack
    from craft_ray.config import AnchorsConfig

    config = experiment(text_model, tmp_path, None)
    model = teacher(config)
    monkeypatch.setattr(model.module.config, "attention_chunk_size", 8, raising=False)
    assert isinstance(config.anchors, AnchorsConfig)
    assert tokens_per_pack(model, config.anchors) == 0
    asked = config.changed({"anchors.pack_tokens": 64}).anchors
    assert asked
    with pytest.raises(ConfigError, match=r"anchors.pack_tokens is 64, but LlamaModel attends within chunks"):
        tokens_per_pack(model, asked)
    assert model.module.training


def test_a_choice_of_layers_and_positions_reads_their_vectors(text_model: Path, tmp_path: Path) -> None:
    config = experiment(text_model, tmp_path, None)
    built(config)
    model = teacher(config)
    everything = Hidden(model, open_anchors(cache_folder(config)), LAYERS, POSITIONS)
    some = open_mode(config.changed({"craft.layers": [-1, 0], "craft.positions": ["last_token", "all"]}), model, None)
    rows = [4, 2, 9]
    full, chosen = everything.teacher_vectors(rows), some.teacher_vectors(rows)
    most = int(full.valid_BV.shape[1])
    assert chosen.values_BLVD.shape[1] == 2
    longest = chosen.values_BLVD.shape[2] - 1
    last = sum(everything.anchors.vectors(rows, p)[0].shape[1] for p in POSITIONS[:4])
    assert torch.equal(chosen.values_BLVD[:, 0, 0], full.values_BLVD[:, 2, last])
    assert torch.equal(chosen.values_BLVD[:, 1, 1:], full.values_BLVD[:, 0, :longest])
    assert longest < most
    with torch.no_grad():
        assert some.loss(some.batch(rows)) < 1e-9


# -- reading


def test_a_ragged_gather_equals_slicing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [random.normal(size=(n, 6)).astype("<f2") for n in (3, 0, 1, 7, 2)]
    chunks = [rows[:2], rows[2:3], rows[3:]]
    write_ragged(
        tmp_path / "x", ((np.concatenate(chunk).reshape(-1), np.array([len(r) for r in chunk])) for chunk in chunks)
    )
    ragged = Ragged(tmp_path / "x", np.dtype("<f2"), 6)
    assert len(ragged) == 5
    for row, expected in enumerate(rows):
        np.testing.assert_array_equal(ragged[row], expected)
    for chosen in ([4, 0, 0], [3], [1, 2], [2, 1, 4, 3]):
        values, valid = ragged.gather(chosen)
        assert values.shape == (len(chosen), max(len(rows[i]) for i in chosen), 6)
        for i, row in enumerate(chosen):
            assert valid[i].sum() == len(rows[row])
            np.testing.assert_array_equal(values[i][valid[i]], rows[row])


def test_an_anchor_stays_on_its_side_of_the_split_when_anchors_are_added(text_model: Path, tmp_path: Path) -> None:
    sides: dict[int, dict[str, bool]] = {}
    for count in (30, 60):
        source = prompts(tmp_path / f"{count}.jsonl", [1 + i % 5 for i in range(count)])
        config = text_experiment(text_model, source, tmp_path / str(count), {"anchors.positions": ["last_token"]})
        built(config)
        anchors = open_anchors(cache_folder(config))
        train, held = anchors.split(0.3)
        assert sorted([*train, *held]) == list(range(count))
        assert 0.1 < len(held) / count < 0.5
        sides[count] = {anchors.id(row): row in held for row in range(count)}
        assert anchors.split(0.0) == (list(range(count)), [])
    assert {name: sides[60][name] for name in sides[30]} == sides[30]
