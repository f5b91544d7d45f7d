"""Legacy torch shards become a cache that trains; what does not fit, or could run code, is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from craft_pipelines.anchors import build, import_legacy
from craft_pipelines.compare import compare

from craft_ray.anchors.build import only_writer
from craft_ray.anchors.legacy_files import ShardFiles
from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.reader import open_anchors
from craft_ray.anchors.verify import check_files
from craft_ray.config import Experiment
from craft_ray.data.source import open_source
from craft_ray.errors import CacheRefused, ConfigError, CraftError, StorageError
from craft_ray.models.base import IGNORE, Model
from craft_ray.models.vision_language import VisionLanguageModel
from craft_ray.retention.constraints import open_mode
from craft_ray.run.folder import RunFolder
from craft_ray.run.locks import only_command
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train
from craft_ray.workers import OneWorker
from tests.support.caches import cache_folder, prompts, shards, table, teacher, text_experiment
from tests.support.experiments import Digits

ROWS = 12


@torch.no_grad()
def legacy_shard(config: Experiment, model: Model, rows: range, positions: list[str], layers: list[int]) -> dict:
    """What an earlier tool wrote: prompt and suffix in one row, padded; labels beside them."""
    assert config.anchors
    source = open_source(config.anchors.source, "anchors.source")
    samples = [source[row] for row in rows]
    model.module.eval()
    suffixes = model.generate([model.preprocess(sample) for sample in samples], 2)
    features = [model.preprocess(s, t) for s, t in zip(samples, suffixes, strict=True)]
    batch = model.collate(features, positions)
    assert batch.pooling
    labels = torch.full_like(batch.inputs["input_ids"], IGNORE)
    for row, f in enumerate(features):
        own = slice(f.layout.prompt_length, f.layout.length)
        labels[row, own] = f.tokens["input_ids"][own]
    images = {"pixel_values": batch.inputs["pixel_values"]} if "pixel_values" in batch.inputs else {}
    return {
        **images,
        "input_ids": batch.inputs["input_ids"],
        "attention_mask": batch.inputs["attention_mask"],
        "teacher_hidden": batch.pooling(model.hidden_states(batch, layers)).values_BLVD,
        "labels": labels,
        "meta": {"layer_indices": layers, "pooling": positions},
    }


def digits_import(digits: Digits, folder: Path) -> Experiment:
    return digits.experiment(
        folder,
        {"anchors.positions": ["text_last", "vision_mean"], "craft.anchor_batch_size": 4, "train.steps": 3},
    )


@pytest.fixture(scope="module")
def digits_shards(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Legacy shards of 7 and 5 rows. Shared: do not write into it."""
    folder = tmp_path_factory.mktemp("legacy")
    config = digits_import(digits, folder)
    model = teacher(config)
    for number, rows in enumerate((range(7), range(7, ROWS))):
        content = legacy_shard(config, model, rows, ["text_last", "vision_mean"], [3, 4])
        torch.save(content, folder / f"shard_{number:03d}.pt")
    return folder


@pytest.fixture
def pictures(digits: Digits, digits_shards: Path, tmp_path: Path) -> Experiment:
    """A config of an import, and its legacy shards in `tmp_path / legacy`."""
    shutil.copytree(digits_shards, tmp_path / "legacy")
    return digits_import(digits, tmp_path)


@pytest.fixture
def prose(text_model: Path, tmp_path: Path) -> Experiment:
    """The same of a language model: texts of mixed lengths, padded on the left."""
    source = prompts(tmp_path / "anchors.jsonl", [3, 1, 9, 4, 2, 6, 3, 8, 5, 2, 7, 4])
    config = text_experiment(
        text_model,
        source,
        tmp_path,
        {"anchors.positions": ["last_token"], "craft.anchor_batch_size": 4, "anchors.max_new_tokens": 2},
    )
    content = legacy_shard(config, teacher(config), range(ROWS), ["last_token"], [2, 3])
    lengths = content["attention_mask"].sum(1).tolist()
    for name in ("input_ids", "labels", "attention_mask"):
        rows = content[name]
        content[name] = torch.stack([row.roll(len(row) - n) for row, n in zip(rows, lengths, strict=True)])
    (tmp_path / "legacy").mkdir()
    torch.save(content, tmp_path / "legacy" / "shard_0.pt")
    return config


def imported(config: Experiment, tmp_path: Path, check: bool = True) -> list[str]:
    lines: list[str] = []
    import_legacy(tmp_path / "legacy", config, check, say=lines.append)
    return lines


def trained(config: Experiment, path: Path) -> list[dict]:
    folder = RunFolder(path)
    folder.begin(config, ["test"])
    train(config, folder, OneWorker(), NullObserver())
    return folder.read_metrics()


@pytest.mark.parametrize("kind", ["pictures", "prose"])
def test_an_imported_cache_holds_every_row_and_trains(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    config: Experiment = request.getfixturevalue(kind)
    (first, last) = imported(config, tmp_path)
    assert first.startswith("the model reproduces 8 anchors: largest relative mean square")
    assert "16 of 16 suffix tokens equal" in first
    assert f"{ROWS} anchors from" in last

    folder = cache_folder(config)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    ids = table(folder)["id"].to_pylist()
    expected = [f"shard_000:{i}" for i in range(7)] + [f"shard_001:{i}" for i in range(5)]
    assert ids == (expected if kind == "pictures" else [f"shard_0:{i}" for i in range(ROWS)])
    anchors = open_anchors(folder)
    assert {len(anchors.suffix(row)) for row in range(ROWS)} <= {1, 2}
    model = teacher(config)
    source = open_source(config.anchors.source, "anchors.source")  # type: ignore[union-attr]
    for row in range(ROWS):
        features = model.preprocess(source[row])
        input_ids, pixels = anchors.tensors(row)
        np.testing.assert_array_equal(input_ids, features.tokens["input_ids"].numpy())
        if kind == "pictures":
            np.testing.assert_array_equal(pixels, features.images["pixel_values"][0].numpy())

    for mode in ("hidden", "token_ce"):
        run = config.changed({"craft.retention_mode": mode, "craft.epsilon_start": 0.01})
        student = open_mode(run, model, model.weights_fingerprint())
        student.check_untouched(range(ROWS), 4)
        records = trained(run, tmp_path / mode)
        assert len(records) == config.train.steps
    # A second import finds the cache.
    before = [path.read_bytes() for path in shards(folder)]
    imported(config, tmp_path)
    assert [path.read_bytes() for path in shards(folder)] == before


def test_a_comparison_runs_on_an_imported_cache(pictures: Experiment, tmp_path: Path) -> None:
    """As a single run does: nothing is built."""
    imported(pictures, tmp_path, check=False)
    # Its first run is held, so that it ends where the runs begin.
    with (
        only_command(RunFolder(tmp_path / "out" / "runs" / "digits-hidden-seed0")),
        pytest.raises(ConfigError, match="another process"),
    ):
        compare(pictures, ("hidden",), (0,), tmp_path / "out")
    with pytest.raises(CacheRefused, match="was imported, not built"):
        build(pictures)


def change(tmp_path: Path, edit: Callable[[dict], Any], name: str = "shard_000.pt") -> None:
    path = tmp_path / "legacy" / name
    content = torch.load(path, weights_only=True)
    content = edit(content) or content
    torch.save(content, path)


def refused(config: Experiment, tmp_path: Path, error: type[CraftError], code: int, *parts: str) -> None:
    with pytest.raises(error) as caught:
        imported(config, tmp_path)
    assert caught.value.exit_code == code
    assert "\n" not in caught.value.message
    assert not [part for part in parts if part not in caught.value.message], caught.value.message
    assert not cache_folder(config).exists()
    assert not list(tmp_path.glob(".*.tmp"))


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_with_code_is_not_run(pictures: Experiment, tmp_path: Path) -> None:
    torch.save({"input_ids": Harmful(tmp_path / "harm")}, tmp_path / "legacy" / "shard_000.pt")
    refused(pictures, tmp_path, CacheRefused, 4, "shard_000.pt", "a pickle that runs code is not loaded")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["hidden_anchor_shard_000000.pt", "shard_000000.pt"])
def test_a_cache_of_the_openvla_scripts_is_said_to_be_one(pictures: Experiment, tmp_path: Path, name: str) -> None:
    legacy = tmp_path / "legacy"
    for file in legacy.iterdir():
        file.unlink()
    record = {
        "model_inputs": {"input_ids": torch.tensor([1, 2]), "attention_mask": torch.ones(2, dtype=torch.bool)},
        "target_features": torch.zeros(64, dtype=torch.float16),
        "meta": {"layer": -2, "pooling": "mean_image_tokens"},
    }
    torch.save({"records": [record], "meta": {"schema_version": 1, "hidden_layer": -2}}, legacy / name)
    refused(pictures, tmp_path, CacheRefused, 4, str(legacy), "for OpenVLA", "craft-ray anchors build")


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda c: c.pop("attention_mask") is None, ["no tensor attention_mask", "input_ids, teacher_hidden"]),
        (lambda c: c.pop("pixel_values") is None, ["has no pixel_values", "vision_language"]),
        (lambda c: c.pop("labels") is None, ["holds no labels", "anchors.modes=[hidden]"]),
        (lambda c: c.pop("teacher_hidden") is None, ["no hidden states", "anchors.modes=[token_ce]"]),
        (lambda c: {**c, "target_features": c["teacher_hidden"] + 1}, ["are both present and differ"]),
        (lambda c: {**c, "teacher_hidden": c["teacher_hidden"][:, :1]}, ["[7, 1, 2, 64]", "2 layers [3, 4]"]),
        (lambda c: {**c, "teacher_hidden": c["teacher_hidden"][..., :32]}, ["[7, 2, 2, 32]", "width 64"]),
        (lambda c: {**c, "meta": {"layers": [-3, -2]}}, ["layers [-3, -2]", "anchors.layers [3, 4]"]),
        (lambda c: {**c, "meta": {"pooling": "mean_image_tokens"}}, ["pooling vision_mean", "text_last, vision_mean"]),
        (lambda c: {**c, "labels": c["labels"].roll(1, 1)}, ["shifted"]),
        (lambda c: {**c, "labels": c["labels"] * 0 - 100}, ["row 0 has no label"]),
        (lambda c: {**c, "pixel_values": c["pixel_values"].byte()}, ["torch.uint8", "[7, C, H, W] float"]),
        (lambda c: [c], ["holds a list"]),
        (lambda c: {**c, "teacher_hidden": c["teacher_hidden"] * 1e9}, ["float16 ends at 6.55e+04", "anchors.dtype"]),
    ],
)
def test_shards_that_do_not_fit_name_both_sides(
    edit: Callable[[dict], Any], parts: list[str], pictures: Experiment, tmp_path: Path
) -> None:
    def edited(content: dict) -> Any:
        result = edit(content)
        return result if isinstance(result, (dict, list)) else content

    change(tmp_path, edited)
    code = 1 if "anchors.dtype" in parts else 4
    refused(pictures, tmp_path, CraftError, code, *parts)


def test_vectors_that_the_teacher_does_not_give_are_refused(pictures: Experiment, tmp_path: Path) -> None:
    change(tmp_path, lambda c: {**c, "teacher_hidden": c["teacher_hidden"].flip(1), "meta": {}}, "shard_001.pt")
    refused(pictures, tmp_path, CacheRefused, 4, "anchor shard_001:", "float16 storage explains 1e-06")
    imported(pictures, tmp_path, check=False)
    model = teacher(pictures)
    student = open_mode(pictures, model, model.weights_fingerprint())
    with pytest.raises(CacheRefused, match="away from the cached teacher"):
        student.check_untouched(range(ROWS), 4)  # training would have found it too


def test_labels_that_are_not_the_teachers_are_refused_unless_declared_as_responses(
    pictures: Experiment, tmp_path: Path
) -> None:
    change(tmp_path, lambda c: {**c, "labels": torch.full((7, 1), 9)})
    change(tmp_path, lambda c: {**c, "labels": torch.full((5, 1), 9)}, "shard_001.pt")
    tokens = pictures.changed({"anchors.modes": ["token_ce"]})
    refused(tokens, tmp_path, CacheRefused, 4, "of 8 cached suffix tokens", "anchors.suffix_from")
    imported(tokens.changed({"anchors.suffix_from": "response"}), tmp_path)
    assert table(cache_folder(pictures))["suffix"].to_pylist() == [[9]] * ROWS


@pytest.mark.parametrize("shape", ["BLD", "BVD", "BD"])
def test_shorter_shapes_of_vectors(shape: str, pictures: Experiment, tmp_path: Path) -> None:
    layers = [3, 4] if "L" in shape else [4]
    positions = ["vision_mean", "text_last"] if "V" in shape else ["text_last"]
    config = pictures.changed({"anchors.layers": layers, "anchors.positions": positions, "anchors.modes": ["hidden"]})
    for number, rows in enumerate((range(7), range(7, ROWS))):
        content = legacy_shard(config, teacher(config), rows, positions, layers)
        vectors = content.pop("teacher_hidden")
        vectors = vectors if "V" in shape else vectors[:, :, 0]
        vectors = vectors if "L" in shape else vectors[:, 0]
        content["target_features"] = vectors
        torch.save(content, tmp_path / "legacy" / f"shard_{number:03d}.pt")
    assert vectors.ndim == len(shape)
    assert imported(config, tmp_path)[0].startswith("the model reproduces 8 anchors")


Shard = dict[str, Any]


def plainly_imported(config: Experiment, tmp_path: Path) -> pa.Table:
    """The table of the unchanged shards' cache, which is put away."""
    imported(config, tmp_path)
    result = table(cache_folder(config))
    shutil.rmtree(cache_folder(config))
    return result


def edit_all(tmp_path: Path, edit: Callable[[Shard], Shard]) -> None:
    for name in ("shard_000.pt", "shard_001.pt"):
        change(tmp_path, edit, name)


BOTH = {"pooling_strategy": {"vision": "mean", "text": "last"}}


@pytest.mark.parametrize(
    ("meta", "notice"),
    [
        ({"layers_to_save": [2, 3], **BOTH}, "layers_to_save [2, 3] are blocks, counted from 0: hidden states [3, 4]"),
        ({"layers_to_save": [-2, -1], "token_pooling": ["vision_token_mean", "text_token_last"]}, None),
        ({"layers": "-2,-1", "pooling": "vision_token_mean,text_token_last", "hidden_layer": None}, None),
        ({"layers": "[2, 3]", "pooling": ["mean_image_tokens", "text_last"], "num_vision_tokens": 16}, "blocks"),
        ({"layer_indices": [3, 4], "pooling_strategy": None, **BOTH, "n_vecs": 2}, None),
    ],
)
def test_meta_of_every_earlier_builder_names_the_vectors(
    meta: dict, notice: str | None, pictures: Experiment, tmp_path: Path
) -> None:
    """The vectors are in the shard's order, the image's first; the config has the other one."""
    plain = plainly_imported(pictures, tmp_path)
    edit_all(tmp_path, lambda c: {**c, "teacher_hidden": c["teacher_hidden"].flip(2), "meta": meta})
    lines = imported(pictures, tmp_path)
    assert table(cache_folder(pictures)).equals(plain)
    assert [line for line in lines if notice and notice in line] == lines[: len(lines) - 2]
    assert len(lines) == 2 + (notice is not None)


def test_a_part_of_the_vectors_can_be_imported(pictures: Experiment, tmp_path: Path) -> None:
    plain = plainly_imported(pictures, tmp_path)
    part = pictures.changed({"anchors.positions": ["vision_mean"], "anchors.layers": [-1], "anchors.modes": ["hidden"]})
    imported(part, tmp_path)
    ours, theirs = (
        np.array(found["hidden_vision_mean"].to_pylist(), dtype=np.float16).reshape(ROWS, -1, 64)
        for found in (table(cache_folder(part)), plain)
    )
    np.testing.assert_array_equal(ours[:, 0], theirs[:, 1])


def test_the_position_that_the_teacher_does_not_give_is_named(pictures: Experiment, tmp_path: Path) -> None:
    def garble(shard: Shard) -> Shard:
        shard["teacher_hidden"][:, :, 0] = 1.0
        return shard

    edit_all(tmp_path, garble)
    refused(
        pictures, tmp_path, CacheRefused, 4, "vision_mean is reproduced and text_last is not",
        "anchors.positions=[vision_mean]",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("meta", "parts"),
    [
        ({"layers_to_save": [3, 4]}, ["layers_to_save [3, 4]", "layer 5 is out of range"]),
        ({"layers_to_save": [1, 2]}, ["layers_to_save [1, 2] (blocks, counted from 0: hidden states [2, 3] here)",
                                      "anchors.layers [3, 4]: set anchors.layers=[2, 3]"]),
        ({"layers": "the last two"}, ["layers 'the last two', which names no layers"]),
        ({"hidden_layer": {"a": 1}}, ["hidden_layer {'a': 1}, which names no layers"]),
        ({"hidden_layer": -2}, ["hidden_layer [-2], the config says anchors.layers [3, 4]: set anchors.layers=[-2]"]),
    ],
)  # fmt: skip
def test_meta_that_does_not_fit_is_one_line(meta: dict, parts: list[str], pictures: Experiment, tmp_path: Path) -> None:
    edit_all(tmp_path, lambda c: {**c, "meta": meta})
    refused(pictures, tmp_path, CacheRefused, 4, *parts)


@pytest.mark.parametrize("kind", ["pictures", "prose"])
def test_rows_are_cut_behind_their_last_label(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """What a teacher went on to generate behind its end of sequence is attended to and has no label."""
    config: Experiment = request.getfixturevalue(kind)
    plain = plainly_imported(config, tmp_path)

    def longer(shard: Shard) -> Shard:
        more = torch.full((len(shard["input_ids"]), 3), 7)
        shard["input_ids"] = torch.cat([shard["input_ids"], more], 1)
        shard["attention_mask"] = torch.cat([shard["attention_mask"], torch.ones_like(more)], 1)
        shard["labels"] = torch.cat([shard["labels"], torch.full_like(more, IGNORE)], 1)
        return shard

    for file in sorted((tmp_path / "legacy").iterdir()):
        change(tmp_path, longer, file.name)
    imported(config, tmp_path)
    assert table(cache_folder(config)).equals(plain)


def test_prompts_without_image_tokens_get_them_back(pictures: Experiment, tmp_path: Path) -> None:
    """As the processor puts them, before the text; also the line break that it ends a prompt with."""
    plain = plainly_imported(pictures, tmp_path)
    model = teacher(pictures)
    assert isinstance(model, VisionLanguageModel)
    added = torch.tensor([model.module.config.image_token_id, model.tokenizer.convert_tokens_to_ids("\n")])

    def without(shard: Shard) -> Shard:
        keep = ~torch.isin(shard["input_ids"], added) | (shard["labels"] != IGNORE)
        for name in ("input_ids", "attention_mask", "labels"):
            shard[name] = shard[name][keep].view(len(keep), -1)
        return shard

    edit_all(tmp_path, without)
    lines = imported(pictures, tmp_path)
    assert "tokens put back for the image" in lines[0]
    assert table(cache_folder(pictures)).equals(plain)

    shutil.rmtree(cache_folder(pictures))
    edit_all(tmp_path, lambda c: {**c, "input_ids": torch.where(c["labels"] == IGNORE, 3, c["input_ids"])})
    refused(pictures, tmp_path, CacheRefused, 4, "shard_000.pt", "hold no image tokens, and PaliGemmaProcessor")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"num_shards": 3, "num_anchors": 20}', "holds 2 shards, its metadata.json says 3"),
        ('{"num_shards": 2, "num_anchors": 13}', "holds 12 anchors, its metadata.json says 13"),
        ('{"num_shards": 2, "num_samples": 11}', "holds 12 anchors, its metadata.json says 11"),
        ('{"num_shards": ', "metadata.json is not a JSON object"),
        ("[2]", "metadata.json is not a JSON object"),
    ],
)
def test_metadata_says_whether_shards_are_missing(
    content: str, said: str, pictures: Experiment, tmp_path: Path
) -> None:
    (tmp_path / "legacy" / "metadata.json").write_text(content)
    refused(pictures, tmp_path, CacheRefused, 4, said)
    (tmp_path / "legacy" / "metadata.json").write_text('{"num_shards": 2, "num_anchors": 12, "prompts": ["a"]}')
    imported(pictures, tmp_path)


def test_shards_are_found_by_any_name_and_ordered_by_their_numbers(tmp_path: Path) -> None:
    names = ["shard_2.pt", "shard_9.pt", "shard_10.pt", "shard-0000.pth", "other.pt", "shard_3.txt"]
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in ShardFiles(tmp_path).files] == ["shard-0000.pth", *names[:3]]
    (tmp_path / "shard_9.pth").touch()
    with pytest.raises(CacheRefused, match=r"holds shard_9\.pt and shard_9\.pth: keep one"):
        ShardFiles(tmp_path)
    with pytest.raises(ConfigError, match="there are no legacy shards"):
        ShardFiles(tmp_path / "nowhere")


@pytest.mark.parametrize(("held", "dtype"), [("bfloat16", "float16"), ("bfloat16", "float32"), ("float16", "float32")])
def test_vectors_may_be_as_coarse_as_the_type_that_held_them(
    held: str, dtype: str, pictures: Experiment, tmp_path: Path
) -> None:
    kind: torch.dtype = getattr(torch, held)
    config = pictures.changed({"anchors.dtype": dtype, "anchors.modes": ["hidden"]})
    edit_all(tmp_path, lambda c: {**c, "teacher_hidden": c["teacher_hidden"].to(kind)})
    imported(config, tmp_path)
    manifest = read_manifest(cache_folder(config))
    assert (manifest.identity.rounded_to, manifest.identity.rounding) == (held, held)
    expected = torch.load(tmp_path / "legacy" / "shard_000.pt", weights_only=True)["teacher_hidden"]
    found = open_anchors(cache_folder(config)).vectors(range(7), "text_last")[0]
    kept = expected[:, :, 0].to(getattr(torch, dtype)).numpy()
    np.testing.assert_array_equal(found[:, 0], kept)
    model = teacher(config)
    open_mode(config, model, model.weights_fingerprint()).check_untouched(range(ROWS), 4)


def test_positions_of_many_vectors_are_refused(pictures: Experiment, tmp_path: Path) -> None:
    config = pictures.changed({"anchors.positions": ["all"]})
    refused(config, tmp_path, ConfigError, 2, "anchors.positions has all", "one vector per position")


def test_a_folder_without_shards(pictures: Experiment, tmp_path: Path) -> None:
    for path in (tmp_path / "legacy").iterdir():
        path.unlink()
    refused(pictures, tmp_path, ConfigError, 2, "no legacy shards in", "shard_*.pt")


def test_a_truncated_shard_leaves_nothing_behind(pictures: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "legacy" / "shard_001.pt"
    path.write_bytes(path.read_bytes()[:-200])
    refused(pictures, tmp_path, CacheRefused, 4, "shard_001.pt is damaged")


def test_an_import_that_was_killed_is_started_again(pictures: Experiment, tmp_path: Path) -> None:
    half = tmp_path / f".{cache_folder(pictures).name}.1234.tmp" / "shards"
    half.mkdir(parents=True)
    (half / "shard-00000.parquet").write_bytes(b"PAR1 half")
    imported(pictures, tmp_path)
    assert len(table(cache_folder(pictures))) == ROWS
    assert not half.parent.exists()


def test_a_damaged_shard_is_imported_again(pictures: Experiment, tmp_path: Path) -> None:
    """A build could not write it, and an import that finds a cache changes nothing."""
    imported(pictures, tmp_path, check=False)
    folder = cache_folder(pictures)
    manifest = read_manifest(folder)
    path = shards(folder)[1]
    whole = path.read_bytes()
    for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-100], None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(CacheRefused, match=r"delete its folder and run 'craft-ray anchors import' again$"):
            check_files(folder, manifest)
    shutil.rmtree(folder)
    imported(pictures, tmp_path, check=False)
    check_files(folder, manifest)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("long", r"has \d+ tokens, model\.max_length is 128"),
        ("id", "with id 9999, but the model has embeddings for ids 0"),
    ],
)
def test_a_row_that_the_model_does_not_take_is_refused(
    wrong: str, said: str, prose: Experiment, tmp_path: Path
) -> None:
    """Wherever it is: the teacher runs on the first rows of a shard only."""

    def edit(shard: Shard) -> None:
        shard["input_ids"], shard["attention_mask"], shard["labels"] = (
            torch.nn.functional.pad(shard[name], (200, 0), value=fill)
            for name, fill in (("input_ids", 7), ("attention_mask", 0), ("labels", IGNORE))
        )
        if wrong == "long":
            shard["attention_mask"][10, :200] = 1
        else:
            shard["input_ids"][10, int(shard["attention_mask"][10].int().argmax())] = 9999

    change(tmp_path, edit, "shard_0.pt")
    config = prose.changed({"model.max_length": 128})
    refused(config, tmp_path, CacheRefused, 4, "shard_0.pt, row 10: ", "nothing was imported")
    with pytest.raises(CacheRefused, match=said):
        imported(config, tmp_path)


def test_another_cache_in_the_folder_is_left_alone(pictures: Experiment, tmp_path: Path) -> None:
    imported(pictures, tmp_path)
    manifest = read_manifest(cache_folder(pictures))
    with pytest.raises(
        CacheRefused, match=r"holds a cache with dtype float16, this import makes one with dtype float32"
    ):
        imported(pictures.changed({"anchors.dtype": "float32"}), tmp_path)
    assert read_manifest(cache_folder(pictures)) == manifest


def test_a_failed_write_leaves_nothing_behind(
    pictures: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from craft_ray.anchors import importing

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importing, "write_manifest", full)
    refused(pictures, tmp_path, StorageError, 1, "No space left on device", "could not be written")


def test_one_process_at_a_time_writes_a_cache(pictures: Experiment, tmp_path: Path) -> None:
    with only_writer(cache_folder(pictures)):
        refused(pictures, tmp_path, CacheRefused, 4, "another process is writing the cache in")
    imported(pictures, tmp_path)
    bucket = pictures.changed({"craft.anchor_cache_dir": "s3://anchors"})
    refused(bucket, tmp_path, ConfigError, 2, "s3://anchors, a whole bucket: name a folder in it, s3://anchors/anchors")
