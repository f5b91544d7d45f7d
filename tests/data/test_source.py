"""The same samples come out of every format, unchanged; what cannot be a sample is named by file and row."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from craft_ray.config import Columns
from craft_ray.data.images import decode_image, encoded_image
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, CraftError, DataError
from tests.support.configs import data_config

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {"key": "b", "question": "Wo?", "answer": "hier", "options": ["hier", "dort"]},
    {"key": "a", "question": "2024-02-30T00:00:00", "answer": "2024-01-01", "options": ["2024-01-01", "no"]},
    {"key": "c", "question": "naïve \u2028 ✓\n", "answer": " ", "options": [" ", "x"]},
]
COLUMNS = {"id": "key", "prompt": "question", "response": "answer", "choices": "options"}
ANSWERED: dict[str, str | None] = {"prompt": "question", "response": "answer"}
INDEXED: dict[str, str | None] = {"prompt": "question", "choices": "options", "answer_index": "right"}
SAMPLES = [
    Sample(row["key"], row["question"], None, row["answer"], tuple(row["options"])) for row in ROWS
]  # fmt: skip


def source(path: Path | str, columns: dict[str, str | None] | None = None, **settings: Any) -> Source:
    columns = COLUMNS if columns is None else columns
    return open_source(data_config(path=str(path), columns=columns, **settings), "task")


def refusal(error: type[CraftError], make: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        make()
    assert "\n" not in caught.value.message
    return caught.value.message


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def json_list(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=2))
    return path


def json_with_mark(path: Path) -> Path:
    """As Windows writes it: a byte order mark, carriage returns, an empty line, no newline at the end."""
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, ROWS)).encode())
    return path


def saved_dataset(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


def saved_splits(path: Path) -> Path:
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(parts).save_to_disk(path)
    return path


def folder_of_parquet(path: Path) -> Path:
    path.mkdir()
    parquet(path / "train-1.parquet", ROWS[1:])
    parquet(path / "train-0.parquet", ROWS[:1])
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "rows.jsonl": lambda path: jsonl(path, ROWS),
    "list.json": json_list,
    "windows.jsonl": json_with_mark,
    "rows.parquet": lambda path: parquet(path, ROWS),
    "saved": saved_dataset,
    "splits": saved_splits,
    "parts": folder_of_parquet,
}


def test_a_list_is_read_with_every_character_that_ends_a_line_somewhere(tmp_path: Path) -> None:
    """JSON has no line breaks within a text, but Unicode has characters for them that may stand there as they are."""
    rows = [{**ROWS[0], "question": "one\u2028two\u2029three\u0085four\x7f", "answer": "x\r\ny"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), newline="")
    (sample,) = source(tmp_path / "list.json")
    assert (sample.prompt, sample.response) == (rows[0]["question"], rows[0]["answer"])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    found = source(FORMATS[name](tmp_path / name))
    assert len(found) == 3
    assert list(found) == SAMPLES
    assert [found[row] for row in (2, 0)] == [SAMPLES[2], SAMPLES[0]]
    assert found.ids() == ["b", "a", "c"]


@pytest.mark.parametrize(("name", "settings"), [("x.parquet.part", "parquet"), ("x.log", "jsonl")])
def test_the_format_can_be_named(name: str, settings: Any, tmp_path: Path) -> None:
    write = parquet if settings == "parquet" else jsonl
    assert list(source(write(tmp_path / name, ROWS), format=settings)) == SAMPLES


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_several_files_are_read_in_the_order_of_their_names(form: Any, tmp_path: Path) -> None:
    write = parquet if form == "parquet" else jsonl
    write(tmp_path / f"b.{form}", ROWS[1:])
    write(tmp_path / f"a.{form}", ROWS[:1])
    assert list(source(tmp_path / f"*.{form}")) == SAMPLES
    assert list(source(tmp_path, format=form)) == SAMPLES


def test_a_split_is_chosen_by_name(tmp_path: Path) -> None:
    folder = saved_splits(tmp_path / "splits")
    assert list(source(folder, split="test")) == SAMPLES[:1]
    message = refusal(ConfigError, lambda: source(folder, split="validation"))
    assert "no split 'validation', only train, test" in message


def test_columns_that_are_not_named_are_not_read(tmp_path: Path) -> None:
    found = source(jsonl(tmp_path / "a.jsonl", ROWS), {"prompt": None, "response": "answer"})
    assert found[0] == Sample("00000000", "", None, "hier", None)
    assert found.ids() == ["00000000", "00000001", "00000002"]
    assert [s.id for s in found] == found.ids()


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    for path in (jsonl(tmp_path / "a.jsonl", ROWS), parquet(tmp_path / "a.parquet", ROWS)):
        assert list(source(path, limit=2)) == SAMPLES[:2]
        assert source(path, limit=2).ids() == ["b", "a"]
        assert list(source(path, limit=9)) == SAMPLES


def test_numbers_are_read_as_they_are_written(tmp_path: Path) -> None:
    """A table would make 1 into 1.0 beside a fraction, and a date of what looks like one."""
    rows = [{"prompt": 1}, {"prompt": 2.5}, {"prompt": "3"}, {"prompt": "2024-01-01 10:00:00"}]
    found = source(jsonl(tmp_path / "a.jsonl", rows), {})
    assert [s.prompt for s in found] == ["1", "2.5", "3", "2024-01-01 10:00:00"]


# --- a format that is decided on opening -------------------------------------------------------------------


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        write = parquet if name.endswith(".parquet") else jsonl
        write(path / name, ROWS)
    return path


def test_a_folder_is_read_as_what_is_in_it(tmp_path: Path) -> None:
    for names in (("a.jsonl",), ("a.parquet",)):
        found = source(folder(tmp_path / names[0], *names))
        assert list(found) == SAMPLES
        assert found.fingerprint == source(tmp_path / names[0] / names[0]).fingerprint


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        (
            ("a.jsonl",),
            {"episodes": [1]},
            "episodes belongs to a LeRobotDataset (format: lerobot), but task is read as",
        ),
        (("a.parquet",), {"revision": "v2"}, "revision belongs to a Hugging Face dataset (format: dataset)"),
        (("a.parquet",), {"chunk_chars": 3}, "chunk_chars belongs to plain text (format: text), but task is read as"),
        (("meta/info.json",), {"columns": COLUMNS}, "columns belongs to JSON lines (format: jsonl) or"),
    ],
)
def test_a_folder_of_another_kind_than_the_keys(
    names: tuple[str, ...], settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = folder(tmp_path / "data", *names)
    message = refusal(ConfigError, lambda: open_source(data_config(path=str(path), **settings), "task"))
    assert message.startswith(f"task.{expected}")


# --- plain text ---------------------------------------------------------------------------------------------------


def test_text_is_cut_into_chunks_that_end_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("ÄÖÜäöüß", encoding="utf-8")
    (tmp_path / "a.txt").write_text("abcdef")
    (tmp_path / "c.txt").write_text("")
    found = source(tmp_path / "*.txt", {"prompt": "text"}, chunk_chars=3)
    assert [s.prompt for s in found] == ["abc", "def", "ÄÖÜ", "äöü", "ß"]
    labels = source(tmp_path / "*.txt", {"prompt": None, "response": "text"}, chunk_chars=3)
    assert [(s.prompt, s.response) for s in labels] == [("", s.prompt) for s in found]
    assert [s.prompt for s in source(tmp_path, {"prompt": "text"}, format="text", chunk_chars=100)] == [
        "abcdef", "ÄÖÜäöüß",
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["txt", "md", "py", "rst"])
def test_endings_of_text(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{ending}").write_text("abc")
    assert [s.prompt for s in source(tmp_path / f"a.{ending}", {"prompt": "text"})] == ["abc"]


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert "does not read as text" in refusal(ConfigError, lambda: source(tmp_path / "a.txt", {"prompt": "text"}))


# --- images -------------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def image_paths(folder: Path) -> Path:
    (folder / "images").mkdir()
    for i, pixels in enumerate(PIXELS):
        (folder / "images" / f"{i}.png").write_bytes(png(pixels))
    return jsonl(folder / "a.jsonl", [{"image": "images/0.png"}, {"image": str(folder / "images" / "1.png")}])


def image_cells(cells: list[Any]) -> Callable[[Path], Path]:
    return lambda folder: parquet(folder / "a.parquet", [{"image": cell} for cell in cells])


def image_feature(folder: Path) -> Path:
    features = datasets.Features({"image": datasets.Image()})
    cells = [Image.fromarray(pixels) for pixels in PIXELS]
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


def image_feature_in_parquet(folder: Path) -> Path:
    datasets.load_from_disk(image_feature(folder)).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def pair_with_path(folder: Path) -> Path:
    image_paths(folder)
    cells = [{"bytes": None, "path": "images/0.png"}, {"bytes": png(PIXELS[1]), "path": "ignored.png"}]
    return image_cells(cells)(folder)


IMAGES: dict[str, Callable[[Path], Path]] = {
    "paths": image_paths,
    "bytes": image_cells([png(p) for p in PIXELS]),
    "pairs": image_cells([{"bytes": png(p), "path": None} for p in PIXELS]),
    "pairs-with-a-path": pair_with_path,
    "arrays": image_cells([p.tolist() for p in PIXELS]),
    "arrays-in-json": lambda folder: jsonl(folder / "a.jsonl", [{"image": p.tolist()} for p in PIXELS]),
    "whole-floats": image_cells([p.astype(float).tolist() for p in PIXELS]),
    "image-feature": image_feature,
    "image-feature-in-parquet": image_feature_in_parquet,
}


@pytest.mark.parametrize("form", IMAGES)
def test_every_form_of_an_image(
    form: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = IMAGES[form](tmp_path)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    found = source(path, {"prompt": None, "image": "image"})
    for sample, pixels in zip(found, PIXELS, strict=True):
        assert isinstance(sample.image, bytes)
        assert np.array_equal(np.asarray(decode_image(sample.image, sample.id)), pixels)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 4)])
def test_arrays_of_one_and_four_channels(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    image = np.asarray(decode_image(encoded_image(array, Path(), "row 0"), "row 0"))
    channels = array.reshape(4, 6, -1)[:, :, :3]
    assert np.array_equal(image, np.broadcast_to(channels, (4, 6, 3)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([[0.5, 1.0]], "whole numbers from 0 to 255"),
        ([[0, 256]], "runs from 0 to 256"),
        ([[-1, 3]], "runs from -1 to 3"),
        ([[1.0, float("nan")]], "NaN or infinity"),
        ([[1.0, float("inf")]], "NaN or infinity"),
        ([[1, 2], [3]], "rows of different lengths"),
        (np.zeros((3, 4, 6)), "shape \\(3, 4, 6\\)"),
        (np.zeros((4,)), "shape \\(4,\\)"),
        (np.zeros((0, 4)), "shape \\(0, 4\\)"),
        ([["a", "b"]], "numbers from 0 to 255 are expected"),
        ([[None, 1]], "numbers from 0 to 255 are expected"),
        (None, "NoneType"),
        (7, "int"),
        ({"bytes": None, "path": None}, "NoneType"),
        ("nothing.png", "nothing.png does not open"),
        (".", "does not open"),
    ],
)
def test_what_is_not_an_image(value: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"row 7: .*{expected}"):
        encoded_image(value, tmp_path, "row 7")


def test_relative_paths_start_from_what_all_files_share(tmp_path: Path) -> None:
    """Not from the first file's folder, where there may be another image of the same name."""
    for name, pixels in zip("ab", PIXELS, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(pixels))
        jsonl(tmp_path / name / "rows.jsonl", [{"image": "0.png"}])
    found = source(tmp_path / "*" / "rows.jsonl", {"prompt": None, "image": "image"})
    assert str(tmp_path / "0.png") in refusal(DataError, lambda: found[1])


# --- what is not a sample --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize("column", ["question", "answer", "key"])
def test_an_empty_cell_is_named(form: str, value: float | None, column: str, tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[1][column] = value
    if form == "parquet" and value is not None:
        for row in rows:
            row[column] = 1.0 if row[column] != value else value
        rows[1][column] = value
    path = (parquet if form == "parquet" else jsonl)(tmp_path / f"a.{form}", rows)
    found = source(path)
    message = refusal(DataError, lambda: list(found))
    assert f"{path}, row 1: column '{column}' holds {value}" in message
    if column == "key":
        assert message == refusal(DataError, found.ids)


def test_a_row_without_the_column(tmp_path: Path) -> None:
    found = source(jsonl(tmp_path / "a.jsonl", [ROWS[0], {"key": "x", "options": []}]))
    assert "row 1: column 'question' holds None" in refusal(DataError, lambda: found[1])


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("value", [None, "hier"])
def test_choices_that_are_not_a_list(form: str, value: str | None, tmp_path: Path) -> None:
    """A word would be taken for a list of letters."""
    path = (parquet if form == "parquet" else jsonl)(tmp_path / f"a.{form}", [{**ROWS[0], "options": value}])
    assert f"row 0: column 'options' holds {value!r}" in refusal(DataError, lambda: source(path)[0])


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_position_of_the_right_choice_serves_as_a_response(form: str, tmp_path: Path) -> None:
    rows = [{**row, "right": i % 2} for i, row in enumerate(ROWS)]
    path = (parquet if form == "parquet" else jsonl)(tmp_path / f"a.{form}", rows)
    found = source(path, {**INDEXED, "id": "key"})
    assert found.has_responses
    assert [sample.response for sample in found] == ["hier", "no", " "]
    assert [sample.choices for sample in found] == [sample.choices for sample in SAMPLES]


@pytest.mark.parametrize("value", [2, -1, 1.0, "1", None, True])
def test_a_position_outside_the_choices(value: Any, tmp_path: Path) -> None:
    """Counted from the end, rounded or parsed from text, it would be another answer."""
    rows = [{**ROWS[0], "right": 0}, {**ROWS[1], "right": value}]
    found = source(jsonl(tmp_path / "a.jsonl", rows), INDEXED)
    assert found[0].response == "hier"
    message = refusal(DataError, lambda: found[1])
    assert f"row 1: column 'right' holds {value!r}; the position of the right one among its 2 choices" in message
    assert "a.jsonl" in message


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"answer_index": "i", "choices": "c", "response": "r"},
            "response 'r' and answer_index 'i' both give the answer",
        ),
        ({"answer_index": "i"}, "answer_index 'i' is an index into choices: specify choices"),
    ],
)
def test_a_position_needs_choices_and_excludes_a_response(columns: dict[str, str], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Columns(**columns)


def test_a_duplicate_id(tmp_path: Path) -> None:
    found = source(jsonl(tmp_path / "a.jsonl", [*ROWS, ROWS[1]]))
    assert "id 'a' is in more than one row" in refusal(DataError, found.ids)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "splits"])
def test_a_missing_column(form: str, tmp_path: Path) -> None:
    name = next(name for name in FORMATS if form in name)
    path = FORMATS[name](tmp_path / name)
    message = refusal(ConfigError, lambda: source(path, {"prompt": "Question"}))
    assert "task.columns.prompt is 'Question'" in message
    assert "has the columns key, question, answer, options" in message


@pytest.mark.parametrize(
    "name", ["no.jsonl", "no.parquet", "no.txt", "*.parquet", "no", "no/*.jsonl", "sub.parquet/no.jsonl"]
)
def test_missing_data(name: str, tmp_path: Path) -> None:
    message = refusal(ConfigError, lambda: source(tmp_path / name))
    assert message.startswith(f"task: there is no data at {tmp_path / name}")


def test_a_hub_name_that_cannot_be_reached() -> None:
    assert "craft-ray-tests/not-there" in refusal(ConfigError, lambda: source("craft-ray-tests/not-there"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b""), ("a.jsonl", b"\n\n"), ("a.json", b"[]"), ("a.txt", b"")],
)
def test_data_without_a_row(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert "holds no sample" in refusal(DataError, lambda: source(tmp_path / name, {"prompt": "text"}))


def test_tables_without_a_row(tmp_path: Path) -> None:
    schema = pa.schema([("prompt", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    assert "holds no sample" in refusal(DataError, lambda: source(tmp_path / "a.parquet", {}))
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "b.parquet")
    assert [s.prompt for s in source(tmp_path / "*.parquet", {})] == ["x"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', "a.jsonl, line 2"),
        ('{"prompt": "a"}\n\n{bad}\n', "a.jsonl, line 3"),
        ('"a"\n', "a.jsonl, line 1: a str, not an object"),
        ("[1, 2]", "a.jsonl, line 1: a int, not an object"),
        ('[{"prompt": "a"},', "a.jsonl: "),
    ],
)
def test_broken_json_is_named_by_its_line(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    message = refusal(ConfigError, lambda: source(tmp_path / "a.jsonl", {}))
    assert f"{tmp_path / 'a.jsonl'} does not read as jsonl ({expected}" in message


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None])
def test_a_broken_parquet_file(content: bytes | None, tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert f"{path} does not read as parquet (" in refusal(ConfigError, lambda: source(path))


# --- identity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_fingerprint_depends_on_the_content_and_not_on_the_path(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / f"copy{Path(name).suffix}"
    shutil.copytree(path, copy) if path.is_dir() else shutil.copyfile(path, copy)
    before = source(path).fingerprint
    assert source(copy).fingerprint == before
    for file in [copy, *copy.rglob("*.arrow"), *copy.rglob("*.parquet")]:
        if file.is_file():
            file.write_bytes(file.read_bytes().replace(b"hier", b"HIER"))
    assert source(copy).fingerprint != before
    assert source(copy)[0].response == "HIER"


def test_the_fingerprint_depends_on_how_the_content_is_read(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    different = [
        source(path),
        source(path, {**COLUMNS, "prompt": "answer"}),
        source(path, {**COLUMNS, "choices": None}),
        source(path, limit=2),
        source(saved_splits(tmp_path / "splits")),
        source(tmp_path / "splits", split="test"),
    ]
    assert len({s.fingerprint for s in different}) == len(different)
    (tmp_path / "a.txt").write_text("abcd")
    chunked = {source(tmp_path / "a.txt", {"prompt": "text"}, chunk_chars=n).fingerprint for n in (1, 2)}
    assert len(chunked) == 2


@pytest.mark.parametrize(
    ("name", "columns", "settings", "fingerprint"),
    [
        ("a.jsonl", ANSWERED, {}, "4266a1ea93d725ac6fc73c8b2f74e06b"),
        (
            "a.jsonl",
            {"prompt": "question", "response": "answer"},
            {"limit": 1, "format": "jsonl"},
            "c0ce9340c963ace7354d4de5619e9c10",
        ),
        (
            "a.jsonl",
            {"prompt": "question", "choices": "options", "answer_index": "right"},
            {},
            "81731af93428a0ef27460267b49a354b",
        ),
        ("a.txt", {"prompt": "text"}, {}, "d6adfa749b4cc2826367d6ed25190d91"),
        ("a.txt", {"prompt": "text"}, {"chunk_chars": 3}, "c9f929709011cda9f408ecb140a5e973"),
    ],
)
def test_the_fingerprint_is_unchanged(
    name: str, columns: dict[str, str | None], settings: Any, fingerprint: str, tmp_path: Path
) -> None:
    """Known answers: existing caches and scores are found by them."""
    row = {"question": "Wo?", "answer": "hier", "options": ["hier", "dort"], "right": 0}
    jsonl(tmp_path / "a.jsonl", [row, {**row, "question": "naïve ✓"}])
    (tmp_path / "a.txt").write_text("abcdefgh")
    assert source(tmp_path / name, columns, **settings).fingerprint == fingerprint


@pytest.mark.parametrize("form", ["jsonl", "parquet", "parts"])
def test_a_file_that_was_rewritten_is_read_again(form: str, tmp_path: Path) -> None:
    """With the same size and time as before, which is how a cache by path would take it for the old one."""
    seen = []
    for word in ("hier", "dort", "hier"):
        rows = [{**row, "answer": word} for row in ROWS]
        if form == "parts":
            (tmp_path / "parts").mkdir(exist_ok=True)
            path, file = tmp_path / "parts", parquet(tmp_path / "parts" / "train.parquet", rows)
        else:
            path = file = (parquet if form == "parquet" else jsonl)(tmp_path / f"a.{form}", rows)
        os.utime(file, (1e9, 1e9))
        found = source(path)
        seen.append(found.fingerprint)
        assert [s.response for s in found] == [word] * 3
    assert seen[0] == seen[2] != seen[1]


def test_nothing_is_written_beside_the_data_and_nothing_fetched(tmp_path: Path) -> None:
    """In a separate process, without a network, and with a cache folder that is checked."""
    data, cache, home = tmp_path / "data", tmp_path / "cache", tmp_path / "home"
    data.mkdir()
    home.mkdir()
    for name in ("rows.jsonl", "rows.parquet", "saved", "parts"):
        FORMATS[name](data / name)
    before = sorted((p, p.stat().st_mtime_ns) for p in data.rglob("*"))
    program = f"""
import socket
def refuse(*_, **__):
    raise AssertionError("something used the network")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from craft_ray.config import AutoData, Columns
from craft_ray.data.source import open_source
for name in ("rows.jsonl", "rows.parquet", "saved", "parts"):
    config = AutoData(path={str(data)!r} + "/" + name, columns=Columns(**{COLUMNS!r}))
    print([sample.id for sample in open_source(config, "task")])
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HOME": str(home), "HF_HOME": str(cache), "TMPDIR": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=home, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['b', 'a', 'c']"] * 4
    assert sorted((p, p.stat().st_mtime_ns) for p in data.rglob("*")) == before
    assert [p for p in home.rglob("*") if p.is_file()] == []
