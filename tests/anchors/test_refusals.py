"""Every way in which a cache can be wrong ends in one line that names both sides, and in the right exit code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from craft_pipelines import cli

from craft_ray.anchors.manifest import check_same, read_manifest
from craft_ray.anchors.matching import select
from craft_ray.anchors.verify import check_files
from craft_ray.config import Experiment, dump_config
from craft_ray.errors import CacheRefused, ConfigError, CraftError, DataError
from craft_ray.retention.constraints import open_mode
from craft_ray.retention.reforward import reforward
from tests.support.caches import built, cache_folder, json_lines, prompts, shards, teacher, text_experiment
from tests.support.experiments import Digits


@pytest.fixture(scope="module")
def whole(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A complete cache of 20 anchors in 3 shards; copy it before you damage it."""
    folder = tmp_path_factory.mktemp("whole")
    config = text_experiment(text_model, prompts(folder / "anchors.jsonl", [3, 9, 1, 14] * 5), folder)
    built(config)
    return config


@pytest.fixture
def config(whole: Experiment, tmp_path: Path) -> Experiment:
    """A copy of the cache that a test may damage."""
    shutil.copytree(cache_folder(whole), tmp_path / "anchors")
    return whole.changed({"craft.anchor_cache_dir": str(tmp_path / "anchors")})


def open_as_student(config: Experiment) -> None:
    """What a run does before its first step."""
    model = teacher(config)
    anchors = open_mode(config, model, model.weights_fingerprint())
    anchors.check_untouched(range(8), 4)


def refused(config: Experiment, error: type[CraftError], exit_code: int, *both_sides: str) -> None:
    with pytest.raises(error) as caught:
        open_as_student(config)
    check_error(caught.value, exit_code, *both_sides)


def check_error(error: CraftError, exit_code: int, *parts: str) -> None:
    assert error.exit_code == exit_code
    assert "\n" not in error.message
    assert not [part for part in parts if part not in error.message], error.message


def test_the_undamaged_cache_is_accepted(config: Experiment) -> None:
    open_as_student(config)
    open_as_student(config.changed({"craft.retention_mode": "token_ce", "craft.epsilon_start": 0.1}))


# -- files


def test_no_cache(config: Experiment) -> None:
    shutil.rmtree(cache_folder(config))
    refused(config, CacheRefused, 4, "there is no anchor cache in", "craft-ray anchors build")


def test_a_half_written_cache(config: Experiment) -> None:
    (cache_folder(config) / "manifest.json").unlink()
    refused(config, CacheRefused, 4, "half-written", "did not finish", "craft-ray anchors build")


def without_a_key(text: str) -> str:
    tree = json.loads(text)
    del tree["identity"]["layers"]
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda text: text[:100], ["manifest.json is damaged"]),
        (lambda text: text[:0] + "[]", ["manifest.json is damaged"]),
        (without_a_key, ["manifest.json is damaged"]),
        (lambda text: text.replace('"format": 1', '"format": 7'), ["format 7", "reads format 1"]),
        (lambda text: text.replace('"precision": "fp32"', '"precision": "bf16"'), ["was changed by hand"]),
    ],
)
def test_manifest_damaged_or_edited(edit: Callable[[str], str], parts: list[str], config: Experiment) -> None:
    path = cache_folder(config) / "manifest.json"
    path.write_text(edit(path.read_text()))
    refused(config, CacheRefused, 4, *parts)


def test_one_flipped_bit(config: Experiment) -> None:
    path = shards(cache_folder(config))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(config, CacheRefused, 4, "shard-00001.parquet is damaged", "its checksum is", "the manifest says")
    with pytest.raises(CacheRefused, match="damaged"):
        built(config)  # a build does not take it for complete either


def test_truncated_shard(config: Experiment) -> None:
    path = shards(cache_folder(config))[2]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    refused(config, CacheRefused, 4, "shard-00002.parquet", f"{size - 100} bytes", f"the manifest says {size}")
    with pytest.raises(CacheRefused, match=r"shard-00002\.parquet is damaged"):
        built(config)


def test_shard_missing(config: Experiment) -> None:
    shards(cache_folder(config))[0].unlink()
    refused(config, CacheRefused, 4, "shard-00000.parquet is missing", "the manifest names it")


def test_shard_of_other_rows(config: Experiment) -> None:
    first, second, _ = shards(cache_folder(config))
    (cache_folder(config) / "manifest.json").unlink()
    shutil.copy(first, second)
    with pytest.raises(CacheRefused, match=r"shard-00001\.parquet holds other rows than the plan says"):
        built(config)


# -- another cache


def test_another_teacher(config: Experiment, tmp_path: Path) -> None:
    model = teacher(config)
    with torch.no_grad():
        next(model.module.parameters())[0, 0] += 1e-3
    model.save(tmp_path / "other")
    other = config.changed({"model.path": str(tmp_path / "other")})
    ours, theirs = model.weights_fingerprint(), teacher(config).weights_fingerprint()
    refused(other, CacheRefused, 4, "another teacher", ours, theirs)
    with pytest.raises(CacheRefused) as caught:
        built(other)
    check_error(caught.value, 4, ours, theirs, "choose another craft.anchor_cache_dir")


def test_another_processor(config: Experiment) -> None:
    other = config.changed({"model.max_length": 300})
    hashes = teacher(config).preprocessor_fingerprint(), teacher(other).preprocessor_fingerprint()
    refused(other, CacheRefused, 4, "another preprocessor", *hashes)


def test_other_arithmetic(config: Experiment) -> None:
    refused(config.changed({"train.precision": "bf16"}), CacheRefused, 4, "arithmetic", "cache fp32", "this run bf16")


def test_layers_that_the_cache_lacks(config: Experiment) -> None:
    refused(config.changed({"craft.layers": [1]}), CacheRefused, 4, "holds layers 2, 3", "asks for 1")
    refused(
        config.changed({"craft.layers": [9]}), CacheRefused, 4, "layer 9 is out of range", "3 (after the final norm)"
    )


def test_positions_that_the_cache_lacks(config: Experiment) -> None:
    other = config.changed({"craft.positions": ["text_last"]})
    refused(other, CacheRefused, 4, "holds positions all", "asks for text_last")


def test_hidden_requested_from_a_cache_of_tokens(config: Experiment, tmp_path: Path) -> None:
    tokens = config.changed({"anchors.modes": ["token_ce"], "craft.anchor_cache_dir": str(tmp_path / "tokens")})
    built(tokens)
    refused(tokens, CacheRefused, 4, "holds mode token_ce", "asks for hidden")
    open_as_student(tokens.changed({"craft.retention_mode": "token_ce", "craft.epsilon_start": 0.1}))


def test_suffixes_of_another_origin(config: Experiment, tmp_path: Path) -> None:
    """Where they are read: hidden states at positions of the prompt do not depend on them."""
    other = config.changed({"anchors.suffix_from": "response"})
    tokens = {"craft.retention_mode": "token_ce", "craft.epsilon_start": 0.1}
    sides = ("was built with anchors.suffix_from teacher", "this run's is response")
    refused(other.changed(tokens), CacheRefused, 4, *sides)
    open_as_student(other)
    folder, found = cache_folder(config), read_manifest(cache_folder(config)).identity
    at_suffix = found.model_copy(update={"positions": ("suffix", "all")})
    assert select(folder, at_suffix, other.changed({"craft.positions": ["all"]}))[1] == ("all",)
    with pytest.raises(CacheRefused, match=sides[0]):
        select(folder, at_suffix, other)
    imported = found.model_copy(update={"inputs": "tensors"})
    select(folder, imported, other.changed(tokens))


def test_a_student_with_dropout(config: Experiment) -> None:
    model = teacher(config)
    for layer in model.module.model.layers:
        layer.self_attn.attention_dropout = 0.5
    anchors = open_mode(config, model, model.weights_fingerprint())
    with pytest.raises(CacheRefused) as caught:
        anchors.check_untouched(range(8), 4)
    check_error(caught.value, 4, "away from the cached teacher", "float16 storage explains 1e-06", "dropout")


def test_a_cache_too_small_to_hold_some_out(text_model: Path, tmp_path: Path) -> None:
    config = text_experiment(text_model, prompts(tmp_path / "one.jsonl", [3]), tmp_path)
    built(config)
    model = teacher(config)
    anchors = open_mode(config, model, None).anchors
    with pytest.raises(CacheRefused) as caught:
        anchors.split(0.2)
    check_error(caught.value, 4, "has 1 anchors", "craft.anchor_holdout")


# -- sources


def failing(config: Experiment, error: type[CraftError], exit_code: int, *parts: str) -> None:
    with pytest.raises(error) as caught:
        built(config)
    check_error(caught.value, exit_code, *parts)
    folder = cache_folder(config)
    assert not (folder / "manifest.json").exists()
    assert not list(folder.rglob(".*"))


def test_empty_source(text_model: Path, tmp_path: Path) -> None:
    config = text_experiment(text_model, json_lines(tmp_path / "none.jsonl", []), tmp_path)
    failing(config, DataError, 1, "anchors.source", "none.jsonl")


def test_an_id_twice(text_model: Path, tmp_path: Path) -> None:
    rows = [{"id": "same", "prompt": "one"}, {"id": "same", "prompt": "two"}]
    config = text_experiment(text_model, json_lines(tmp_path / "a.jsonl", rows), tmp_path)
    failing(config, DataError, 1, "'same'", "unique")


def test_an_image_that_does_not_decode(digits: Digits, tmp_path: Path) -> None:
    anchors = pq.read_table(digits.data / "anchors.parquet").slice(0, 40).to_pydict()
    anchors["image"][37] = b"no image at all"
    pq.write_table(pa.table(anchors), tmp_path / "bad.parquet")
    changes: dict[str, Any] = {"anchors.source.path": str(tmp_path / "bad.parquet")}
    failing(
        digits.experiment(tmp_path, changes),
        DataError, 1, anchors["id"][37], "does not decode", "fix or remove the row",
    )  # fmt: skip


def test_an_anchor_that_is_too_long(config: Experiment, tmp_path: Path) -> None:
    changes = {"model.max_length": 40, "craft.anchor_cache_dir": str(tmp_path / "long")}
    failing(config.changed(changes), DataError, 1, "tokens, model.max_length is 40")


def test_packing_requested_for_a_model_with_images(digits: Digits, tmp_path: Path) -> None:
    config = digits.experiment(tmp_path, {"anchors.pack_tokens": 512})
    failing(config, ConfigError, 2, "anchors.pack_tokens is 512", "vision_language cannot be packed")


def test_a_fact_that_only_one_of_two_caches_has(config: Experiment) -> None:
    """Names of skills are absent from the identity of a cache without them."""
    assert config.anchors
    source = config.anchors.source.model_dump()  # type: ignore[union-attr]
    named = config.changed({"anchors.source": None, "skills": {"walking": {"anchors": source}}})
    with pytest.raises(CacheRefused) as caught:
        built(named)
    sides = ("holds a cache without skills", "this config builds one with skills ('walking',)", "delete the folder")
    check_error(caught.value, 4, *sides)
    folder = cache_folder(config)
    found = read_manifest(folder).identity
    check_same(folder, found, found, "config builds")
    with pytest.raises(CacheRefused, match=r"with skills \('walking',\), this import makes one without skills"):
        check_same(folder, found.model_copy(update={"skills": ("walking",)}), found, "import makes")


def test_layers_that_the_model_lacks(config: Experiment, tmp_path: Path) -> None:
    changes = {"anchors.layers": [7], "craft.anchor_cache_dir": str(tmp_path / "layers")}
    failing(config.changed(changes), ConfigError, 2, "anchors.layers", "layer 7", "0 (embeddings) to 3")


# -- the command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["craft-ray", "anchors", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_verify_and_show_describe_a_cache(
    config: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = cache_folder(config), tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    assert command(monkeypatch, "verify", folder, "--config", file, "--reforward", "6") == 0
    out = capsys.readouterr().out
    assert "3 shards are undamaged, 20 anchors, each id once" in out
    assert "18 of 18 suffix tokens equal" in out

    assert command(monkeypatch, "show", folder) == 0
    out = capsys.readouterr().out
    for fact in ("complete", "20 (raw inputs)", "[2, 3] of 0 to 3, width 96", "all", "float16", "in 3 shards"):
        assert fact in out

    assert command(monkeypatch, "verify", folder, "train.precision=bf16") == 2
    assert "add --config" in capsys.readouterr().err
    assert command(monkeypatch, "verify", folder, "train.precision=bf16", "--config", file) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "cache fp32, this run bf16" in line

    (folder / "manifest.json").unlink()
    assert command(monkeypatch, "show", folder) == 0
    assert "half-written, 3 of 3 shards are there" in capsys.readouterr().out
    assert command(monkeypatch, "verify", folder) == 4
    assert command(monkeypatch, "verify", tmp_path / "nothing") == 4


def test_verify_names_the_worst_row_of_a_cache_with_wrong_content(config: Experiment) -> None:
    """One text differs from what the teacher saw, and all checksums agree: only running the teacher can find it."""
    folder = cache_folder(config)
    path = shards(folder)[1]
    rows = pq.read_table(path)
    texts = rows["prompt"].to_pylist()
    texts[5] = texts[5][::-1]
    pq.write_table(rows.set_column(rows.schema.get_field_index("prompt"), "prompt", pa.array(texts)), path)
    (folder / "manifest.json").unlink()
    built(config)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    with pytest.raises(CacheRefused) as caught:
        reforward(folder, manifest, config, teacher(config), 20)
    check_error(caught.value, 4, "anchor a13", "float16 storage explains 1e-06")


def test_verify_finds_a_duplicate_anchor(config: Experiment) -> None:
    folder = cache_folder(config)
    manifest = read_manifest(folder)
    first = manifest.shards[0]
    shutil.copy(shards(folder)[0], folder / "shards" / "copy.parquet")
    double = manifest.model_copy(update={"shards": (first, first.model_copy(update={"name": "copy.parquet"}))})
    with pytest.raises(CacheRefused) as caught:
        check_files(folder, double)
    check_error(caught.value, 4, "anchor a0 is in shard-00000.parquet and again in copy.parquet")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_teacher_on_gpus_that_are_not_there(whole: Experiment, tmp_path: Path, gpus: int) -> None:
    with pytest.raises(ConfigError) as caught:
        built(whole.changed({"craft.anchor_cache_dir": str(tmp_path / "anchors"), "anchors.gpus_per_actor": gpus}))
    check_error(caught.value, 2, f"anchors.gpus_per_actor is {gpus}, but the teacher's process has 0 GPUs")
