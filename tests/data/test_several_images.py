"""Lists of images: in every form that data sets have, and what is none, named by file and row."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from craft_ray.config import Columns
from craft_ray.data.images import decode_image
from craft_ray.data.source import Source, open_source
from craft_ray.errors import ConfigError, DataError
from tests.support.caches import json_lines
from tests.support.configs import data_config
from tests.support.tiling import png

IMAGES = tuple(png(4, 3, seed) for seed in range(3))
PIXELS = [np.asarray(decode_image(data, "test")) for data in IMAGES]
URIS = ["data:image/png;base64," + base64.b64encode(data).decode() for data in IMAGES]


def opened(path: Path, image: Any = "image", **columns: Any) -> Source:
    return open_source(data_config(path=str(path), columns={"image": image, **columns}), "task")


def same(images: tuple[bytes, ...] | None, numbers: tuple[int, ...]) -> None:
    assert images is not None
    assert len(images) == len(numbers)
    for data, number in zip(images, numbers, strict=True):
        assert np.array_equal(np.asarray(decode_image(data, "test")), PIXELS[number])


@pytest.mark.parametrize("form", ["paths", "uris", "arrays", "bytes", "pairs"])
def test_every_form_of_a_list(form: str, tmp_path: Path) -> None:
    for number, data in enumerate(IMAGES):
        (tmp_path / f"{number}.png").write_bytes(data)
    cells: list[Any] = {
        "paths": ["0.png", "1.png", "2.png"],
        "uris": URIS,
        "arrays": [pixels.tolist() for pixels in PIXELS],
        "bytes": list(IMAGES),
        "pairs": [{"bytes": data, "path": None} for data in IMAGES],
    }[form]
    rows = [{"image": images, "prompt": ""} for images in ([cells[0], cells[2]], [], cells)]
    path = tmp_path / ("a.parquet" if form in ("bytes", "pairs") else "a.jsonl")
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        json_lines(path, rows)
    source = opened(path)
    assert source.has_image_lists
    for row, numbers in enumerate([(0, 2), (), (0, 1, 2)]):
        same(source[row].images, numbers)
        same(source[row].pictures, numbers)
    assert (source[0].image, source[1].image) == ((source[0].images or ())[0], None)


def test_several_columns_are_one_list(tmp_path: Path) -> None:
    rows = [{"left": URIS[0], "right": URIS[1]}, {"left": URIS[2], "right": None}, {"left": None, "right": None}]
    source = opened(json_lines(tmp_path / "a.jsonl", rows), ["left", "right"], prompt=None)
    assert source.has_image_lists
    for row, numbers in enumerate([(0, 1), (2,), ()]):
        same(source[row].images, numbers)
    other = opened(tmp_path / "a.jsonl", ["right", "left"], prompt=None)
    same(other[0].images, (1, 0))
    assert other.fingerprint != source.fingerprint


def test_a_single_image_is_no_list(tmp_path: Path) -> None:
    """Its source has the fingerprint that it had before there were lists, so that caches keep theirs."""
    (tmp_path / "a.png").write_bytes(b"first")
    rows = [
        {"image": "a.png", "prompt": "A?", "response": "a"},
        {"image": "data:image/png;base64,c2Vjb25k", "prompt": "B?", "response": "b"},
    ]
    source = opened(json_lines(tmp_path / "a.jsonl", rows), response="response")
    assert source.fingerprint == "9b5ac4cc8a39bf48e9454cf1cddc3fd3"
    assert not source.has_image_lists
    assert [(sample.image, sample.images, sample.pictures) for sample in source] == [
        (b"first", None, (b"first",)), (b"second", None, (b"second",)),
    ]  # fmt: skip
    array = json_lines(tmp_path / "b.jsonl", [{"image": PIXELS[0].tolist(), "prompt": ""}])
    assert not opened(array).has_image_lists


def test_the_content_of_every_image_counts(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(IMAGES[0])
    path = json_lines(tmp_path / "a.jsonl", [{"image": ["a", "b"], "prompt": ""}])
    before = opened(path).fingerprint
    assert opened(path).fingerprint == before
    (tmp_path / "b").write_bytes(IMAGES[1])
    assert opened(path).fingerprint != before


@pytest.mark.parametrize(
    ("row", "image", "expected"),
    [
        ({"image": [URIS[0], None, URIS[1]]}, "image", "row 1: image 2 in the list of column 'image' is null"),
        ({"image": [None]}, "image", "row 1: image 1 in the list of column 'image' is null"),
        ({"left": None, "right": URIS[1]}, ["left", "right"], "row 1: column 'left' holds no image, but 'right'"),
        ({"image": ["no.png"]}, "image", r"row 1: the image .*no\.png does not open"),
        ({"image": [URIS[0], 7.5]}, "image", "row 1: the image is a (Written)?Float"),
    ],
)
def test_what_is_no_list_of_images(row: dict[str, Any], image: Any, expected: str, tmp_path: Path) -> None:
    good = {name: [URIS[0]] for name in row}
    path = json_lines(tmp_path / "a.jsonl", [each | {"prompt": "?"} for each in (good, row)])
    source = opened(path, image)
    same(source[0].images, (0,) * len(row))
    with pytest.raises(DataError, match=rf"a\.jsonl, {expected}") as caught:
        source[1]
    assert "\n" not in caught.value.message


def test_a_null_among_the_images_of_a_conversation(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image> or <image>?"}]
    rows = [{"image": images, "messages": turns} for images in (URIS[:2], [URIS[0], None], URIS)]
    source = opened(json_lines(tmp_path / "a.jsonl", rows), messages="messages")
    same(source[0].pictures, (0, 1))
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: image 2 in the list of column 'image' is null"):
        source[1]
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: the turns name 2 images, but its row holds 3"):
        source[2]


def test_a_row_without_a_list_among_lists(tmp_path: Path) -> None:
    rows = [{"image": images, "prompt": ""} for images in (URIS[:2], None)]
    source = opened(json_lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match=r"row 1: column 'image' holds nothing; a list of images is expected, an empty"):
        source[1]


def test_a_list_among_single_images(tmp_path: Path) -> None:
    rows = [{"image": None, "prompt": ""}, {"image": URIS[0], "prompt": ""}, {"image": URIS[:2], "prompt": ""}]
    source = opened(json_lines(tmp_path / "a.jsonl", rows))
    assert not source.has_image_lists
    with pytest.raises(DataError, match=r"row 2: column 'image' holds a list of images, but a single image in earlier"):
        source[2]
    with pytest.raises(DataError, match=r"row 0: the image is a NoneType"):
        source[0]


def test_columns_that_are_missing_or_named_twice(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"left": URIS[0], "prompt": ""}])
    with pytest.raises(ConfigError, match=r"task\.columns\.image is 'right', but .* has the columns left, prompt"):
        opened(path, ["left", "right"])
    with pytest.raises(ValueError, match="only once"):
        Columns(image=("left", "left"))
    with pytest.raises(ValueError, match="at least one"):
        Columns(image=())
