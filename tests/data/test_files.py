"""The files that are named are read, and no others: special characters, splits, extensions, compressed files."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from craft_ray.config import matching
from craft_ray.data import delimited, parquet
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError
from tests.support.configs import data_config


def source(path: Path, **settings: Any) -> Source:
    columns = {"prompt": "prompt", "response": "prompt"}
    return open_source(data_config(path=str(path), columns=columns, **settings), "task")


def prompts(path: Path, **settings: Any) -> list[str]:
    return [sample.prompt for sample in source(path, **settings)]


def write(path: Path, *words: str) -> Path:
    """A file with a prompt in each row, in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix.lower():
        case ".parquet":
            pq.write_table(pa.table({"prompt": words}), path)
        case ".txt":
            path.write_text("".join(words))
        case ".csv" | ".tsv":
            path.write_text("prompt\n" + "".join(f"{word}\n" for word in words))
        case _:
            path.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    return path


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        make()
    return caught.value.message


# --- names with special characters ---------------------------------------------------------------------------------

SPECIAL = ["data[1]", "q?", "a*", "x::y", "{a,b}", "~u", "tr#ain%20", "[!a]"]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", SPECIAL)
def test_a_name_that_looks_like_a_pattern_is_a_name(name: str, form: str, tmp_path: Path) -> None:
    for other in ("data1", "qa", "ab", "x", "a", "b"):
        write(tmp_path / f"{other}.{form}", "other")
        write(tmp_path / other / f"rows.{form}", "other")
    file, inside = write(tmp_path / f"{name}.{form}", "mine"), write(tmp_path / name / f"rows.{form}", "mine")
    for path in (file, inside, inside.parent, inside.parent / f"*.{form}", inside.parent / f"row[a-z].{form}"):
        assert prompts(path) == ["mine"], path
    assert source(inside.parent).fingerprint == source(file).fingerprint


def test_each_part_of_a_path_is_a_name_before_it_is_a_pattern(tmp_path: Path) -> None:
    for name in ("run[1]/a.txt", "run[1]/b.txt", "run1/a.txt", "run2/a.txt"):
        write(tmp_path / name, name)
    found = {
        pattern: [str(path.relative_to(tmp_path)) for path in matching(tmp_path / pattern)]
        for pattern in ("run[1]/*.txt", "run[12]/a.txt", "run?/b.txt", "run[1]", "*/b.txt")
    }
    assert found == {
        "run[1]/*.txt": ["run[1]/a.txt", "run[1]/b.txt"],
        "run[12]/a.txt": ["run1/a.txt", "run2/a.txt"],
        "run?/b.txt": [],
        "run[1]": ["run[1]"],
        "*/b.txt": ["run[1]/b.txt"],
    }


def test_a_folder_that_the_library_would_take_for_a_pattern(tmp_path: Path) -> None:
    write(tmp_path / "run[1]" / "train" / "a.jsonl", "mine")
    assert "rename the folder" in refusal(lambda: source(tmp_path / "run[1]"))


def test_a_pattern_of_several_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "words")
    write(tmp_path / "b.jsonl", "row")
    assert "have different formats: narrow the pattern" in refusal(lambda: source(tmp_path / "*"))


def test_an_extension_of_no_format(tmp_path: Path) -> None:
    write(tmp_path / "a.log", "row")
    assert "set task.format to jsonl, csv, parquet or text" in refusal(lambda: source(tmp_path / "a.log"))


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet", "txt"])
def test_a_folder_of_splits(form: str, tmp_path: Path) -> None:
    """The split is in the files' names, as on the hub."""
    write(tmp_path / f"new_train-00000-of-00002.{form}", "a")
    write(tmp_path / f"new_train-00001-of-00002.{form}", "b")
    write(tmp_path / f"test.{form}", "c")
    write(tmp_path / f"Dev.v2.{form}", "d")
    columns = {"prompt": "text" if form == "txt" else "prompt"}

    def read(**settings: Any) -> list[str]:
        config = data_config(path=str(tmp_path), columns=columns, **settings)
        return [sample.prompt for sample in open_source(config, "task")]

    assert read() == read(split="train") == ["a", "b"]
    assert read(split="test") == ["c"]
    assert read(split="validation") == ["d"]
    assert "has no split 'nonsense', only test, train, validation" in refusal(lambda: read(split="nonsense"))


def test_a_folder_without_splits_is_the_training_data(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", "b")
    write(tmp_path / "latest.csv", "c")
    write(tmp_path / "a.csv", "a")
    (tmp_path / "._a.csv").write_bytes(b"\0\5\26\7")  # beside each file on a disk that macOS wrote
    assert prompts(tmp_path) == ["a", "b", "c"]
    assert "has no split 'test', only train" in refusal(lambda: source(tmp_path, split="test"))


def test_a_split_beside_a_file_that_has_none(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", "a")
    write(tmp_path / "rows-test.jsonl", "b")
    message = refusal(lambda: source(tmp_path))
    assert "rows-test.jsonl, which is the split 'test', beside rows.jsonl" in message
    assert prompts(tmp_path / "rows*.jsonl") == ["b", "a"]


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", "a")
    assert prompts(path) == ["a"]
    assert "leave split out" in refusal(lambda: source(path, split="test"))


def test_another_split_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "a")
    alone = source(tmp_path).fingerprint
    write(tmp_path / "test.csv", "b")
    assert source(tmp_path).fingerprint == alone


@pytest.mark.parametrize("form", ["rows.jsonl", "rows.csv", "rows.parquet", "saved", "fetched"])
def test_a_part_of_a_split(form: str, tmp_path: Path) -> None:
    words = [str(row) for row in range(10)]
    path = tmp_path / form
    if form == "saved":
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": words})}).save_to_disk(path)
    elif form == "fetched":
        write(path / "data" / "train.jsonl", *words)
        write(path / "data" / "test.jsonl", "other")
    else:
        write(path, *words)
    assert prompts(path, split="train[:30%]") == words[:3]
    assert prompts(path, split="train[2:-5]", limit=2) == words[2:4]
    assert source(path, split="train[1:]")[0].id == "00000000"
    assert source(path, split="train[:5]").fingerprint != source(path, split="train[5:]").fingerprint
    assert "train[oops]" in refusal(lambda: source(path, split="train[oops]"))


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_every_part_of_several_files(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever pieces the files are held in."""
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1)
    monkeypatch.setattr(delimited, "BATCH_CHARACTERS", 1)
    words = [f"word {row}" for row in range(7)]
    for name, some in (("a", words[:3]), ("b", []), ("c", words[3:])):
        write(tmp_path / f"{name}.{form}", *some)
    for start in range(7):
        for stop in range(start + 1, 8):
            config = data_config(
                path=str(tmp_path), columns={"id": "prompt", "prompt": "prompt"}, split=f"train[{start}:{stop}]"
            )
            found = open_source(config, "task")
            assert [sample.prompt for sample in found] == list(found.ids()) == words[start:stop]


def test_documentation_above_the_rows_is_not_read(tmp_path: Path) -> None:
    """As a data set is fetched from the hub."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nwords")
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", "007", "1e3")
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", "x")
    assert prompts(tmp_path) == ["007", "1e3"]
    assert prompts(tmp_path, split="test") == ["x"]
    assert "no split 'validation', only train, test" in refusal(lambda: source(tmp_path, split="validation"))


# --- extensions -------------------------------------------------------------------------------------------------------


def zipped(*files: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:5]) + gzip.compress(data[5:]),  # two members, as pigz and cat write it
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".zip": lambda data: zipped(("folder/", b""), ("folder/rows", data)),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("ending", ["jsonl", "JSONL", "ndjson", "json", "csv", "TSV"])
def test_extensions(ending: str, packing: str, tmp_path: Path) -> None:
    plain = write(tmp_path / f"plain.{ending}", "naïve", "b" * 3000, "3")
    packed = tmp_path / f"rows.{ending}{packing}"
    packed.write_bytes(PACK[packing](plain.read_bytes()))
    assert prompts(packed) == ["naïve", "b" * 3000, "3"]
    plain.unlink()
    assert prompts(tmp_path) == ["naïve", "b" * 3000, "3"]
    assert prompts(tmp_path / f"*.{ending}{packing}") == ["naïve", "b" * 3000, "3"]


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst", ".zip"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_a_packed_file_that_is_damaged(ending: str, packing: str, tmp_path: Path) -> None:
    data = PACK[packing](b"prompt\n" + bytes(range(33, 126)) * 400)
    for name, content in (("cut", data[: len(data) // 2]), ("other", b"no such file" * 9)):
        path = tmp_path / f"{name}.{ending}{packing}"
        path.write_bytes(content)
        assert f"does not read as {'text' if ending == 'txt' else ending} ({path.name}: " in refusal(
            lambda path=path: source(path)
        )


def test_an_archive_of_several_files_or_with_a_password(tmp_path: Path) -> None:
    packed = tmp_path / "rows.csv.zip"
    packed.write_bytes(zipped(("a.csv", b"prompt\nx\n"), ("b.csv", b"prompt\ny\n")))
    assert "rows.csv.zip: it holds 2 files; unpack it" in refusal(lambda: source(packed))
    locked = bytearray(zipped(("a.csv", b"prompt\nx\n")))
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(header) + flags] |= 1
    packed.write_bytes(locked)
    assert "rows.csv.zip: it is encrypted; unpack it" in refusal(lambda: source(packed))


def test_a_long_value_of_csv(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "other"], ["x" * 200_000, "\r\n,\"'"], ["y", ""]])
    assert [len(prompt) for prompt in prompts(tmp_path / "a.csv")] == [200_000, 1]
