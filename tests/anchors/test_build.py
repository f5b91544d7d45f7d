"""Building a cache: every anchor once whatever happens, its size, its types, and what every reader reads from it."""

from __future__ import annotations

import json
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from craft_pipelines import anchors, teachers
from craft_pipelines.anchors import _in_process, build
from PIL import Image

from craft_ray.anchors.build import build_shard, estimate, identity_of, prepare
from craft_ray.anchors.reader import open_anchors
from craft_ray.anchors.show import describe
from craft_ray.anchors.teacher import Teacher
from craft_ray.config import Experiment
from craft_ray.data.images import decode_image
from craft_ray.data.source import open_source
from craft_ray.errors import DataError, StorageError
from craft_ray.models import load_model, vision_language
from craft_ray.models.base import Model
from craft_ray.retention.hidden import Hidden
from tests.support.caches import built, cache_folder, json_lines, prompts, shards, table, teacher, text_experiment
from tests.support.experiments import ANSWERED, Digits

LENGTHS = [3, 9, 1, 14, 6, 2, 30, 5, 8, 12, 4, 7, 1, 22, 3, 10, 6, 2, 9, 17]


@pytest.fixture
def text(text_model: Path, tmp_path: Path) -> Experiment:
    """20 anchors of 1 to 30 words in 3 shards."""
    return text_experiment(text_model, prompts(tmp_path / "anchors.jsonl", LENGTHS), tmp_path)


@pytest.mark.parametrize("positions", [["suffix"], ["text_last", "suffix"], ["text_last"]])
@pytest.mark.parametrize("modes", [["hidden"], ["hidden", "token_ce"]])
@pytest.mark.parametrize("suffix_from", ["teacher", "response"])
def test_each_image_is_decoded_once(
    suffix_from: str,
    modes: list[str],
    positions: list[str],
    digits: Digits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the shard is that of a teacher that preprocesses each sample again for its suffix."""
    changes = {
        "anchors.source": {"path": str(digits.data / "old_val.parquet"), "columns": ANSWERED, "limit": 13},
        "anchors.positions": positions,
        "anchors.modes": modes,
        "anchors.suffix_from": suffix_from,
        "anchors.batch_size": 5,
    }
    config = digits.experiment(tmp_path, changes)
    assert config.anchors
    model, source = teacher(config), open_source(config.anchors.source, "anchors.source")
    runs = Teacher(model, identity_of(config, model, source).schema, config.anchors)
    decoded: list[str] = []

    def counted(data: bytes, what: str) -> Image.Image:
        decoded.append(what)
        return decode_image(data, what)

    monkeypatch.setattr(vision_language, "decode_image", counted)
    build_shard(runs, source, range(len(source)), tmp_path / "once.parquet")
    assert sorted(decoded) == sorted(source[row].where for row in range(len(source)))

    samples, fresh = {source[row].where: source[row] for row in range(len(source))}, teacher(config)
    monkeypatch.setattr(model, "with_suffix", lambda _, suffix, sample: fresh.preprocess(samples[sample], suffix))
    build_shard(runs, source, range(len(source)), tmp_path / "again.parquet")
    assert (tmp_path / "once.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_build_interrupted_at_a_shard_resumes_to_every_anchor_once(
    finished: int, text: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = teachers.build_shard, []

    def interrupted(teacher, source, rows, path):
        if len(written) == finished:
            (path.parent).mkdir(parents=True, exist_ok=True)
            (path.parent / f".{path.name}.1234.tmp").write_bytes(b"PAR1 half")
            raise KeyboardInterrupt
        write(teacher, source, rows, path)
        written.append(path)

    monkeypatch.setattr(teachers, "build_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built(text)
    monkeypatch.setattr(teachers, "build_shard", write)
    resumed = build(text, say=lambda _: None)

    assert resumed.rows_computed == len(LENGTHS) - 8 * finished
    ids = table(cache_folder(text))["id"].to_pylist()
    assert ids == [f"a{i}" for i in range(len(LENGTHS))]
    left = sorted(p.name for p in (cache_folder(text) / "shards").iterdir())
    assert left == [f"shard-0000{i}.parquet" for i in range(3)]
    whole = built(text.changed({"craft.anchor_cache_dir": str(tmp_path / "whole")}))
    assert resumed.manifest.content == whole.content


def test_only_the_manifest_is_written_where_only_the_manifest_is_missing(text: Experiment) -> None:
    manifest = built(text)
    (cache_folder(text) / "manifest.json").unlink()
    again = build(text, say=lambda _: None)
    assert again.rows_computed == 0
    assert again.manifest == manifest


def test_the_teacher_that_checks_the_rows_is_freed_before_the_others_are_loaded(
    text: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []
    alive: list[bool] = []

    def load(*arguments: Any, **options: Any) -> Model:
        model = load_model(*arguments, **options)
        loaded.append(weakref.ref(model.module))
        return model

    def work(*arguments: Any) -> Iterator[tuple[str, int]]:
        alive.append(loaded[0]() is not None)
        return _in_process(*arguments)

    monkeypatch.setattr(anchors, "load_model", load)
    monkeypatch.setattr(anchors, "_in_process", work)
    built(text)
    assert alive == [False]


def test_a_second_build_computes_no_row(text: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(text)
    monkeypatch.delattr(teachers, "build_shard")
    again = build(text, say=lambda _: None)
    assert again.rows_computed == 0
    assert again.manifest == first


def test_a_damaged_shard_that_is_deleted_is_written_again(text: Experiment) -> None:
    manifest = built(text)
    shards(cache_folder(text))[1].unlink()
    again = build(text, say=lambda _: None)
    assert again.rows_computed == 8
    assert again.manifest == manifest


def test_paths_and_number_of_workers_are_not_part_of_the_identity(
    text: Experiment, text_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    source = (tmp_path / "anchors.jsonl").rename(tmp_path / "elsewhere" / "other.jsonl")
    moved = text_experiment(
        text_model, source, tmp_path / "elsewhere", {"anchors.actors": 3, "anchors.batch_size": 2, "name": "other"}
    )
    prompts(tmp_path / "anchors.jsonl", LENGTHS)
    assert built(moved).fingerprint == built(text).fingerprint


def test_estimated_size_is_within_15_percent(digits: Digits, text_model: Path, text_data: Path, tmp_path: Path) -> None:
    digits = digits.experiment(tmp_path / "d", {"anchors.source.limit": 200, "anchors.rows_per_shard": 64})
    prose = text_experiment(text_model, text_data / "anchors.parquet", tmp_path / "t", {"anchors.source.limit": 100})
    answers = [{"id": f"a{i}", "prompt": "Q", "response": "word " * (i % 30 + 1)} for i in range(60)]
    columns = {"id": "id", "prompt": "prompt", "response": "response"}
    answered = {
        "anchors.source.columns": columns,
        "anchors.modes": ["hidden", "replay"],
        "anchors.positions": ["suffix"],
        "anchors.suffix_from": "response",
    }
    long = text_experiment(text_model, json_lines(tmp_path / "long.jsonl", answers), tmp_path / "r", answered)
    for config in (digits, prose, long):
        model, manifest = load_model(config.model, "fp32"), built(config)
        assert config.anchors
        source = open_source(config.anchors.source, "anchors.source")
        expected = estimate(model, source, manifest.identity.schema, config.anchors)
        assert expected.bytes == pytest.approx(manifest.bytes, rel=0.15)
        assert expected.vectors_per_row == pytest.approx(manifest.vectors / manifest.identity.rows, rel=0.15)


@pytest.mark.parametrize("suffix_from", ["teacher", "response"])
def test_only_a_generated_suffix_has_a_longest_length(suffix_from: str, text_model: Path, tmp_path: Path) -> None:
    rows = [{"id": f"a{i}", "prompt": "Q", "response": "a long answer"} for i in range(4)]
    columns = {"id": "id", "prompt": "prompt", "response": "response"}
    changes = {"anchors.suffix_from": suffix_from, "anchors.source.columns": columns, "anchors.modes": ["token_ce"]}
    config = text_experiment(text_model, json_lines(tmp_path / "rows.jsonl", rows), tmp_path, changes)
    said: list[str] = []
    build(config, say=said.append)
    (line,) = (line for line in said if "suffix tokens: " in line)
    (shown,) = (line for line in describe(cache_folder(config)) if "suffix" in line.split())
    words = {"teacher": "the teacher's own, up to 3 tokens", "response": "the data's responses"}[suffix_from]
    assert line.endswith(words)
    assert shown.endswith(words)


def hidden_bytes(folder: Path) -> int:
    """Bytes of the columns of hidden states."""
    total = 0
    for shard in shards(folder):
        metadata = pq.read_metadata(shard)
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            total += sum(c.total_compressed_size for c in columns if c.path_in_schema.startswith("hidden_"))
    return total


def test_float16_halves_the_hidden_states_and_costs_less_than_a_millionth(text: Experiment, tmp_path: Path) -> None:
    full = text.changed({"anchors.dtype": "float32", "craft.anchor_cache_dir": str(tmp_path / "full")})
    built(text), built(full)
    assert hidden_bytes(cache_folder(text)) <= 0.51 * hidden_bytes(cache_folder(full))
    for config, bound in ((text, 1e-6), (full, 1e-10)):
        batches = student(config)
        with torch.no_grad():
            assert batches.loss(batches.batch(range(20))) < bound


def student(config: Experiment) -> Hidden:
    anchors = open_anchors(cache_folder(config))
    identity = anchors.identity
    model = load_model(config.model, config.train.precision)
    return Hidden(model, anchors, identity.layers, identity.positions)


def test_every_parquet_reader_reads_the_same_values(text: Experiment) -> None:
    built(text)
    files = [str(shard) for shard in shards(cache_folder(text))]
    ours = pa.concat_tables(pq.read_table(file) for file in files).to_pydict()
    vectors = ours["hidden_all"]
    assert len(vectors[0]) == len(ours["prompt"][0]) + 1  # a vector for each byte, and one for <bos>
    assert len(vectors[0][0]) == 2 * 96

    duck = duckdb.sql(f"select * from read_parquet({files}) order by cast(id[2:] as int)").to_arrow_table().to_pydict()
    bears = polars.read_parquet(files).to_dict(as_series=False)
    faces = datasets.load_dataset("parquet", data_files=files, split="train").to_dict()
    for theirs in (duck, bears, faces):
        for column in ("id", "prompt", "suffix"):
            assert list(theirs[column]) == ours[column]
        for left, right in zip(theirs["hidden_all"], vectors, strict=True):
            np.testing.assert_array_equal(np.array(left, np.float32), np.array(right, np.float32))


def test_images_keep_their_bytes(digits: Digits, tmp_path: Path) -> None:
    config = digits.experiment(tmp_path)
    built(config)
    given = pq.read_table(digits.data / "anchors.parquet")["image"].to_pylist()[:48]
    assert table(cache_folder(config))["image"].to_pylist() == given


def test_float16_that_overflows_is_refused_and_float32_holds_it(text: Experiment, tmp_path: Path) -> None:
    model = load_model(text.model, "fp32")
    with torch.no_grad():
        model.module.model.norm.weight.mul_(1e6)
    model.save(tmp_path / "huge")
    huge = text.changed({"model.path": str(tmp_path / "huge")})
    with pytest.raises(
        DataError, match=r"row \d+ \(id a\d+\) is .*e\+0\d, float16 ends at 6.55e\+04: set anchors.dtype"
    ):
        built(huge)
    assert not shards(cache_folder(huge))
    built(huge.changed({"anchors.dtype": "float32", "craft.anchor_cache_dir": str(tmp_path / "full")}))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full once a file has `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_damages_nothing_and_the_build_resumes(text_model: Path, tmp_path: Path) -> None:
    source = prompts(tmp_path / "anchors.jsonl", [1] * 8 + [40] * 8)
    config = text_experiment(text_model, source, tmp_path)
    with largest_file(200_000), pytest.raises(StorageError) as caught:  # short texts fit, long ones do not
        built(config)
    assert caught.value.exit_code == 1
    assert "shard-00001.parquet could not be written" in caught.value.message
    assert "free space or choose another folder" in caught.value.message
    assert [p.name for p in (cache_folder(config) / "shards").iterdir()] == ["shard-00000.parquet"]
    first = shards(cache_folder(config))[0].read_bytes()

    assert build(config, say=lambda _: None).rows_computed == 8
    assert shards(cache_folder(config))[0].read_bytes() == first
    assert len(set(table(cache_folder(config))["id"].to_pylist())) == 16


def test_the_manifest_is_readable_json(text: Experiment) -> None:
    manifest = built(text)
    tree = json.loads((cache_folder(text) / "manifest.json").read_text())
    assert tree["identity"]["layers"] == [2, 3]
    assert tree["identity"]["positions"] == ["all"]
    assert tree["fingerprint"] == manifest.fingerprint
    assert sum(shard["rows"] for shard in tree["shards"]) == len(LENGTHS)


@pytest.mark.parametrize(
    ("modes", "positions"),
    [(["hidden"], ["text_last"]), (["hidden", "token_ce"], ["suffix", "text_last"]), (["token_ce"], ["text_last"])],
)
def test_the_teacher_tells_its_progress_in_anchors(modes: list[str], positions: list[str], text: Experiment) -> None:
    padded = {"anchors.pack_tokens": 0, "anchors.batch_size": 4}
    config = text.changed({"anchors.modes": modes, "anchors.positions": positions, **padded})
    model, source = load_model(config.model, "fp32"), open_source(config.anchors.source, "anchors.source")  # type: ignore[union-attr]
    parts: list[float] = []
    assert config.anchors is not None
    teller = Teacher(model, identity_of(config, model, source).schema, config.anchors, parts.append)
    teller.table(prepare(model, source, range(len(source))))
    assert sum(parts) == pytest.approx(len(LENGTHS)), "each anchor counts once, whatever the number of passes"
    assert len(parts) > teller.passes, "more often than once for all"
