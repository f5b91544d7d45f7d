"""Values are read as they are written, whatever stands beside them; what is no text is named by its row."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from craft_ray.data.cells import LONGEST, shown
from craft_ray.data.classes import classes_of
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, CraftError, DataError
from tests.support.configs import data_config

WORDS = ["007", "1", "1.10", "1e3", "true", "2024-01-01", "NA", "null", "nan", "", " x ", "−1", "0x10", "1_000"]
"""What a table would convert."""


def source(path: Path | str, columns: dict[str, str | None] | None = None, **settings: Any) -> Source:
    columns = {"prompt": "prompt", "response": "response"} if columns is None else columns
    return open_source(data_config(path=str(path), columns=columns, **settings), "task")


def responses(path: Path | str, **settings: Any) -> list[str | None]:
    return [sample.response for sample in source(path, **settings)]


def refusal(make: Callable[[], object], error: type[CraftError] = DataError) -> str:
    with pytest.raises(error) as caught:
        make()
    return caught.value.message


def jsonl(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


# --- CSV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_every_value_of_csv_is_text(delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tsv" if delimiter == "\t" else "a.csv")
    path.write_text("".join(f"{a}{delimiter}{b}\n" for a, b in [("prompt", "response"), *((w, w) for w in WORDS)]))
    settings = {"delimiter": ";"} if delimiter == ";" else {}
    assert responses(path, **settings) == WORDS
    assert [sample.prompt for sample in source(path, **settings)] == WORDS
    for word in WORDS:  # alone, where a table would be sure of its type
        path.write_text(f"prompt{delimiter}response\nx{delimiter}{word}\n")
        assert responses(path, **settings) == [word]


def test_a_folder_of_csv_that_was_fetched_from_the_hub(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "train.csv").write_text("prompt,response\na,007\nb,1\n")
    assert responses(tmp_path) == ["007", "1"]
    (tmp_path / "train.csv").rename(tmp_path / "train.jsonl")
    jsonl(tmp_path / "train.jsonl", '{"prompt": 1, "response": 1.10}', '{"prompt": 2, "response": "2024-01-01"}')
    assert responses(tmp_path) == ["1.10", "2024-01-01"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub has under the name org/words. The library takes it from this folder; the rest is its own doing."""
    folder = tmp_path / "hub"
    folder.mkdir()
    builder_of, load = datasets.load_dataset_builder, datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _, **__: builder_of(str(folder)))
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda _, split, **__: load(str(folder), split=split, cache_dir=str(tmp_path / "cache")),
    )
    return folder


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.csv", "prompt,response\na,007\nb,1\nc,\n", ["007", "1", ""]),
        ("train.tsv", "prompt\tresponse\na\t1.10\nb\tTrue\n", ["1.10", "True"]),
        (
            "train.jsonl",
            '{"prompt": "a", "response": 1.10}\n{"prompt": "b", "response": "2024-01-01"}',
            ["1.10", "2024-01-01"],
        ),
        ("train.json", '[{"prompt": "a", "response": 1e3}, {"prompt": "b", "response": "007"}]', ["1e3", "007"]),
    ],
)
def test_values_on_the_hub_are_as_written(name: str, content: str, expected: list[str], hub: Path) -> None:
    (hub / name).write_text(content)
    first = source("org/words", format="dataset")
    assert [sample.response for sample in first] == expected
    assert [s.response for s in source("org/words", format="dataset", split="train[1:]")] == expected[1:]
    assert [s.response for s in source("org/words", format="dataset", limit=1)] == expected[:1]
    assert "no split 'test'" in refusal(lambda: source("org/words", format="dataset", split="test"), ConfigError)
    (hub / name).write_text(content.replace("a", "A"))
    assert source("org/words", format="dataset").fingerprint != first.fingerprint


def test_what_only_the_library_could_read_on_the_hub_is_refused(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        (hub / f"{split}.csv").write_text("prompt,response\na,007\n")
    message = refusal(lambda: source("org/words", format="dataset", split="train+test"), ConfigError)
    assert "converts values of CSV files" in message
    (hub / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  header: 0\n---\n")
    message = refusal(lambda: source("org/words", format="dataset"), ConfigError)
    assert "setting header" in message
    kept = SimpleNamespace(info=SimpleNamespace(builder_name="csv"), config=SimpleNamespace(data_files=None))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: kept)
    assert "the hub is not reached" in refusal(lambda: source("org/words", format="dataset"), ConfigError)


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("metadata.csv", "file_name,prompt,response\na.png,p,007\n", "file_name,prompt,response\na.png,p,x7\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "prompt": "p", "response": 1.10}',
            '{"file_name": "a.png", "prompt": "p", "response": 7}',
        ),
    ],
)
def test_text_beside_pictures_is_as_written_or_refused(name: str, bad: str, good: str, tmp_path: Path) -> None:
    columns = {"prompt": "prompt", "response": "response", "image": "image"}
    for folder, content in (("bad", bad), ("good", good)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.png")
    message = refusal(lambda: source(tmp_path / "bad", columns, format="dataset"), ConfigError)
    assert f"column 'response' of {name}" in message
    own = source(tmp_path / "bad" / name, columns | {"image": "file_name"})[0]
    assert (own.response, own.image) == (
        "007" if name.endswith("csv") else "1.10",
        (tmp_path / "bad/a.png").read_bytes(),
    )
    assert source(tmp_path / "good", columns, format="dataset")[0].response in ("x7", "7")


def test_a_text_that_the_library_takes_for_a_missing_value(tmp_path: Path) -> None:
    columns = {"prompt": "prompt", "response": "response", "image": "image"}
    (tmp_path / "metadata.csv").write_text("file_name,prompt,response\na.png,p,NA\nb.png,p,yes\n")
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    message = refusal(lambda: source(tmp_path, columns, format="dataset"), ConfigError)
    assert "NA in column 'response' of metadata.csv" in message
    own = source(tmp_path / "metadata.csv", columns | {"image": "file_name"})
    assert [sample.response for sample in own] == ["NA", "yes"]


def test_a_table_on_the_hub_keeps_its_types(hub: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": [7, 8]}), hub / "train.parquet")
    assert responses("org/words", format="dataset") == ["7", "8"]


def test_quotes_newlines_and_marks_of_csv(tmp_path: Path) -> None:
    """As Excel writes it: a byte order mark, CRLF, quotes where they are needed."""
    content = '\r\n"prompt",response\r\n"a,b","say ""hi"""\r\n\r\n"two\r\nlines","x\ny"\r\n,"""\r\nlast "quote" , z'
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + content.replace(',"""\r\n', '"",""""\r\n').encode())
    assert [(s.prompt, s.response) for s in source(tmp_path / "a.csv")] == [
        ("a,b", 'say "hi"'), ("two\r\nlines", "x\ny"), ("", '"'), ('last "quote" ', " z"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"prompt,response\na,b\nc\n", "a.csv, row 1 (line 3): 1 values, but the header has 2"),
        (b'prompt,response\n"a\nb",c\nd,e,f\n', "a.csv, row 1 (line 4): 3 values, but the header has 2"),
        (b'prompt,response\na,b\n\n"d\ne",e,f\n', "a.csv, row 1 (line 4): 3 values, but the header has 2"),
        (b'prompt,response\na,"b"c\n', "a.csv, row 0 (line 2): "),
        (b'prompt,response\na,b\nd,"e\nc\n', "a.csv, row 1 (line 3): unexpected end of data"),
        (b'prompt,"response\na,b\n', "a.csv, its header (line 1): unexpected end of data"),
        (b"prompt,response\na,b\n\xff\xfe,c\n", "is not UTF-8"),
        ("prompt,response\na,b\n".encode("utf-16"), "a.csv, after line 0: it is not UTF-8"),
        (b"prompt,response,prompt\na,b,c\n", "its header has 'prompt' twice"),
    ],
)
def test_csv_that_is_wrong_is_named_by_its_line(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    message = refusal(lambda: source(tmp_path / "a.csv"), ConfigError)
    assert "does not read as csv" in message
    assert expected in message


def test_csv_without_a_row_or_a_column(tmp_path: Path) -> None:
    for content in ("", "prompt,response\n"):
        (tmp_path / "a.csv").write_text(content)
        assert "holds no sample" in refusal(lambda: source(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("prompt;response\na;b\n")
    assert "has the columns prompt;response" in refusal(lambda: source(tmp_path / "a.csv"), ConfigError)


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written", ["1.10", "1e3", "1E+2", "-0.0", "12345678901234567890", "0.1000000000000000055", "3"]
)
@pytest.mark.parametrize("form", ["lines", "list"])
def test_a_number_in_json_has_the_digits_of_the_file(form: str, written: str, tmp_path: Path) -> None:
    row = f'{{"prompt": "x", "response": {written}, "c": [{written}], "score": 0.5e1}}'
    text = row if form == "lines" else f"[\n  {row} ,\n {row}]"
    path = jsonl(tmp_path / "a.json", text)
    found = source(path, {"prompt": None, "response": "response", "choices": "c"})[0]
    assert (found.response, found.choices) == (written, (written,))


def test_the_fingerprint_changes_only_where_the_digits_do(tmp_path: Path) -> None:
    """Caches of data that read as before stay valid; of data that formerly read as other digits, they do not."""
    path = tmp_path / "a.jsonl"
    jsonl(path, '{"prompt": 2.5, "response": "x", "other": 1.10}')
    assert source(path).fingerprint == "0294e1e1f127b651188a6f82d9b8ee5d"
    jsonl(path, '{"prompt": 1.10, "response": "x", "other": 2.5}')
    assert source(path).fingerprint != "1570aa2c43c638dd21edf2b352aa2b23"
    assert source(path, {"prompt": "response"}).fingerprint == "6937b3cc6445e709e5e0ad7a9c2faafa"


def test_numbers_and_dates_of_a_typed_table(tmp_path: Path) -> None:
    values = [3, 2.5, Decimal("1.10"), datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1, 10)]
    said = ["3", "2.5", "1.10", "2024-01-01", "2024-01-01 10:00:00"]
    for value, text in zip(values, said, strict=True):
        pq.write_table(pa.table({"prompt": ["x"], "response": [value]}), tmp_path / "a.parquet")
        assert responses(tmp_path / "a.parquet") == [text]
    for narrow in (np.float32, np.float16):
        table = pa.table({"prompt": ["x", "y"], "response": pa.array([narrow(0.1), None])})
        pq.write_table(table, tmp_path / "a.parquet")
        found = source(tmp_path / "a.parquet", {"prompt": "prompt", "id": "response"})
        assert found[0].id == "0.1"
        assert "row 1: column 'response' holds None" in refusal(found.ids)


def test_files_keep_their_own_types(tmp_path: Path) -> None:
    for name, value in (("a", 7), ("b", "007"), ("c", 7.5)):
        pq.write_table(pa.table({"prompt": ["x"], "response": [value]}), tmp_path / f"{name}.parquet")
    assert responses(tmp_path) == ["7", "007", "7.5"]


# --- classes ------------------------------------------------------------------------------------------------------

LABEL = datasets.ClassLabel(names=["no", "yes"])
CLASSES = datasets.Features(
    prompt=datasets.Value("string"),
    response=LABEL,
    options=datasets.List(LABEL),
    answer={"label": LABEL, "options": datasets.LargeList(LABEL), "score": datasets.Value("int64")},
    turns=datasets.List({"0": LABEL, "_type": datasets.Value("string")}, length=1),
)
LABELLED = {
    "prompt": ["a", "b"],
    "response": [1, 0],
    "options": [[0, 1], [1, 0]],
    "answer": [{"label": label, "options": [0, 1], "score": 1} for label in (1, 0)],
    "turns": [[{"0": label, "_type": "x"}] for label in (1, 0)],
}


def labelled(form: str, path: Path) -> None:
    """The same rows in one of the forms that keep the names of classes."""
    table = datasets.Dataset.from_dict(LABELLED, features=CLASSES)
    if form == "saved":
        table.save_to_disk(path)
    elif form == "fetched":
        (path / "data").mkdir(parents=True)
        table.to_parquet(path / "data" / "train-00000-of-00001.parquet")
    else:
        table.to_parquet(path)


FORMS = ["rows.parquet", "saved", "fetched"]


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_that_is_a_class_is_its_name(form: str, tmp_path: Path) -> None:
    path = tmp_path / form
    labelled(form, path)
    assert responses(path) == ["yes", "no"]
    chosen = source(path, {"prompt": "prompt", "choices": "options", "answer_index": "response"})
    assert [(s.choices, s.response) for s in chosen] == [(("no", "yes"), "yes"), (("yes", "no"), "yes")]


@pytest.mark.parametrize("form", FORMS)
def test_a_class_within_a_column_is_its_name(form: str, tmp_path: Path) -> None:
    path = tmp_path / form
    labelled(form, path)
    answers = {
        "answer.label": ["yes", "no"],
        "answer.score": ["1", "1"],
        "options.0": ["no", "yes"],
        "turns.0.0": ["yes", "no"],
        "{prompt} is {answer.label}, {options.1} {turns.0._type}": ["a is yes, yes x", "b is no, no x"],
    }
    for reference, said in answers.items():
        found = source(path, {"prompt": "prompt", "response": reference})
        assert [sample.response for sample in found] == said, reference
    chosen = source(path, {"prompt": "answer.label", "choices": "answer.options", "answer_index": "answer.label"})
    assert [(s.prompt, s.choices, s.response) for s in chosen] == [
        ("yes", ("no", "yes"), "yes"),
        ("no", ("no", "yes"), "no"),
    ]


def test_classes_by_reference_in_what_earlier_versions_wrote() -> None:
    label = {"_type": "ClassLabel", "names": ["no", "yes"]}
    features = {
        "of lists": {"_type": "Sequence", "feature": {"label": label}},  # stored as a mapping of lists
        "of mappings": [{"label": label}],
        "labels": {"_type": "Sequence", "feature": label},
    }
    references = ["of lists.label.0", "of lists.label", "of mappings.0.label", "labels.0", "labels", "labels.first"]
    assert list(classes_of(features, [*references, "no such"])) == references[:-1]


def test_a_label_outside_its_classes(tmp_path: Path) -> None:
    """-1 is how data sets hide the answers of a test."""
    table = datasets.Dataset.from_dict({**LABELLED, "response": [1, -1]}, features=CLASSES)
    table.to_parquet(tmp_path / "a.parquet")
    found = source(tmp_path / "a.parquet")
    assert "row 1: column 'response' holds -1, but its classes are 0 to 1" in refusal(lambda: found[1])


# --- columns that are not named ------------------------------------------------------------------------------------


def test_a_column_that_is_not_named_may_hold_anything(tmp_path: Path) -> None:
    features = datasets.Features(
        prompt=datasets.Value("string"),
        response=datasets.Value("string"),
        clip=datasets.Video(),
        pictures=datasets.List(datasets.Image()),
        nested={"picture": datasets.Image()},
    )
    broken = {"bytes": b"no such", "path": None}
    row = {"clip": broken, "pictures": [broken], "nested": {"picture": broken}}
    table = datasets.Dataset.from_list([{"prompt": "a", "response": "x", **row}], features=features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        assert [(s.prompt, s.response) for s in source(path)] == [("a", "x")]


def test_a_feature_of_a_later_library(tmp_path: Path) -> None:
    schema = pa.schema([("prompt", pa.string()), ("response", pa.string()), ("new", pa.int8())])
    metadata = {"info": {"features": {"new": {"_type": "Hologram"}, "prompt": {"dtype": "string", "_type": "Value"}}}}
    table = pa.table(
        {"prompt": ["a"], "response": ["x"], "new": [1]}, schema.with_metadata({"huggingface": json.dumps(metadata)})
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert responses(tmp_path / "a.parquet") == ["x"]


# --- what is no text -----------------------------------------------------------------------------------------------

NO_TEXT: dict[str, tuple[Any, str]] = {
    "list": ([{"role": "user", "content": "hi"}], "a list"),
    "words": (["Paris"], "a list"),
    "mapping": ({"text": ["Paris"]}, "a mapping"),
    "true": (True, "true or false"),
    "bytes": (b"Paris", "bytes"),
    "duration": (datetime.timedelta(1), "a timedelta"),
}
UNKNOWN = ("bytes", "duration")
"""What JSON cannot hold."""


@pytest.mark.parametrize("role", ["id", "prompt", "response", "choices"])
@pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, form) for kind in NO_TEXT for form in ("jsonl", "parquet") if form == "parquet" or kind not in UNKNOWN],
)
def test_what_is_no_text_is_refused(kind: str, form: str, role: str, tmp_path: Path) -> None:
    value, noun = NO_TEXT[kind]
    cell = [value] if role == "choices" else value
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"prompt": ["x", "x"], "bad": [None, cell]}), path)
    else:
        jsonl(path, json.dumps({"prompt": "x"}), json.dumps({"prompt": "x", "bad": cell}))
    message = refusal(lambda: source(path, {"prompt": "prompt", role: "bad"})[1])
    assert f"{path}, row 1: column 'bad' holds" in message
    assert f"({noun}); text is expected" in message


@pytest.mark.parametrize("text", ["\\ud800", "a\\udfff b", "\\ude00\\ud83d"])
def test_half_a_character_is_refused(text: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", '{"prompt": "x", "other": "\\ud800"}', f'{{"prompt": "{text}"}}')
    assert source(path, {})[0].prompt == "x"
    assert "row 1: column 'prompt'" in refusal(lambda: source(path, {})[1])
    assert "row 1: column 'prompt'" in refusal(source(path, {"id": "prompt"}).ids)


def test_text_that_is_no_utf8_in_parquet(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"a\xff\xfe"))
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "a.parquet")
    found = source(tmp_path / "a.parquet", {})
    assert found[0].prompt == "a"
    assert "row 1: it does not read" in refusal(lambda: found[1])


def test_the_row_of_a_folder_is_that_of_its_file(tmp_path: Path) -> None:
    for form in ("jsonl", "csv", "parquet"):
        folder = tmp_path / form
        folder.mkdir()
        for name, word in (("a", "x"), ("b", None)):
            rows = [{"prompt": "x", "image": "no.png"}, {"prompt": word or "y", "image": word or "none.png"}]
            match form:
                case "jsonl":
                    jsonl(folder / f"{name}.jsonl", *map(json.dumps, rows))
                case "csv":
                    text = "".join(f"{row['prompt']},{row['image']}\n" for row in rows)
                    (folder / f"{name}.csv").write_text(f"prompt,image\n{text}")
                case _:
                    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        found = source(folder, {"image": "image"})
        assert f"{folder}: b.{form}, row 1: the image" in refusal(lambda found=found: found[3])


# --- messages ------------------------------------------------------------------------------------------------------

LONG = "data:image/png;base64," + base64.b64encode(bytes(300_000)).decode()


@pytest.mark.parametrize(
    "value",
    [LONG, ["x" * 400_000] * 3, {LONG: LONG}, {"path": LONG}, {"bytes": LONG}, "x" * 400_000, "\0" * 400_000, [[LONG]]],
    ids=["uri", "list", "mapping", "path", "bytes", "word", "zeros", "nested"],
)
def test_a_long_value_makes_no_long_message(value: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", json.dumps({"prompt": "x", "bad": value}))
    images = source(path, {"image": "bad"})
    if value is LONG or value in ({"path": LONG}, {"bytes": LONG}):
        assert images[0].image == bytes(300_000)
    else:
        assert len(refusal(lambda: images[0])) < 10 * LONGEST + len(str(path))
    if not isinstance(value, list):
        assert len(refusal(lambda: source(path, {"choices": "bad"})[0])) < 10 * LONGEST + len(str(path))
    if not isinstance(value, str):
        assert len(refusal(lambda: source(path, {"prompt": "bad"})[0])) < 10 * LONGEST


def test_long_names_make_no_long_message(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", json.dumps({f"column {i}": 1 for i in range(10_000)} | {"y" * 1_000_000: "x"}))
    assert len(refusal(lambda: source(path), ConfigError)) < 10 * LONGEST
    path = jsonl(tmp_path / "a.jsonl", *[json.dumps({"prompt": "z" * 1_000_000})] * 2)
    assert len(refusal(source(path, {"id": "prompt"}).ids)) < 10 * LONGEST


@pytest.mark.parametrize("value", ["a\nb", None, 3.5, b"x", ["a"], {"a": 1}])
def test_a_short_value_is_shown_whole(value: Any) -> None:
    assert shown(value) == repr(value)


# --- keys that occur twice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "a", "response": "x", "response": "y"}',
        '{"response": "x", "prompt": "a", "response": "x"}',
        '{"prompt": "a", "response": {"text": "x", "text": "y"}}',
        '{"prompt": "a", "response": [1.5, {"at": [{"b": 1, "b": 2}]}]}',
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_key_that_occurs_twice_is_refused_where_it_is_read(row: str, ending: str, tmp_path: Path) -> None:
    """Other parsers take the first value, Python's the last."""
    good = '{"prompt": "q", "response": "r"}'
    (tmp_path / f"a.{ending}").write_text(f"{good}\n{row}" if ending == "jsonl" else f"[{good}, {row}]")
    message = refusal(lambda: source(tmp_path / f"a.{ending}"), ConfigError)
    assert "line 2: the key " in message
    assert "occurs twice in one object" in message


def test_a_key_that_occurs_twice_in_what_is_not_read(tmp_path: Path) -> None:
    rows = [
        '{"prompt": "a", "response": "x", "note": 1, "note": 2}',
        '{"note": {"b": 1, "b": 2}, "prompt": "a", "response": "y"}',
    ]
    assert responses(jsonl(tmp_path / "a.jsonl", *rows)) == ["x", "y"]
