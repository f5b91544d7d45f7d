"""Pictures come out as a person sees them, or are refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from craft_ray.data.images import decode_image, encoded_image
from craft_ray.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def encoded(array: np.ndarray, form: str, mode: str | None = None, orientation: int | None = None) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(buffer, form, exif=exif)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, "row 7")
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(data: bytes) -> str | None:
    """Why bytes are refused; None if they decode."""
    try:
        decode_image(data, "row 7")
    except DataError as error:
        return error.message
    return None


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(orientation: int, form: str, tmp_path: Path) -> None:
    data = encoded(PIXELS, form, orientation=orientation)
    (tmp_path / "a").write_bytes(data)
    expected = np.asarray(load_image(str(tmp_path / "a")))
    assert expected.shape == ((8, 12, 3) if orientation > 4 else (12, 8, 3))
    assert np.array_equal(decoded(data), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes_are_those_of_transformers(mode: str, tmp_path: Path) -> None:
    data = encoded(PIXELS, "TIFF" if mode == "CMYK" else "PNG", mode)
    (tmp_path / "a").write_bytes(data)
    assert np.array_equal(decoded(data), np.asarray(load_image(str(tmp_path / "a"))))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(form: str) -> None:
    ramp = np.linspace(0, 65535, 96).reshape(12, 8).astype(np.uint16)
    grey = decoded(encoded(ramp, form))
    assert len(np.unique(grey)) == 96
    assert np.array_equal(grey, np.repeat((ramp // 256).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.linspace(0, 1, 96, dtype=np.float32), "runs from 0.0 to 1.0"),
        (np.full(96, np.nan, dtype=np.float32), "NaN or infinity"),
        (np.linspace(0, 70000, 96).astype(np.int32), "runs from 0 to 70000"),
    ],
)
def test_values_that_are_no_pixels(array: np.ndarray, expected: str) -> None:
    with pytest.raises(DataError, match=f"row 7: .*{expected}"):
        decode_image(encoded(array.reshape(12, 8), "TIFF"), "row 7")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_wide_values_that_are_pixels(dtype: type) -> None:
    grey = PIXELS[:, :, 0]
    assert np.array_equal(decoded(encoded(grey.astype(dtype), "TIFF"))[:, :, 1], grey)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_a_damaged_picture_is_one_line(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut anywhere, or with a byte changed, it decodes or is refused."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 16)
    data = encoded(PIXELS, form, orientation=6 if form in ("JPEG", "TIFF") else None)
    random = np.random.default_rng(1)
    for _ in range(40):
        changed = bytearray(data)
        changed[random.integers(len(data))] = random.integers(256)
        for broken in (bytes(changed), data[: random.integers(len(data))]):
            assert (said := refusal(broken)) is None or said.startswith("row 7: ")


def test_a_data_uri_is_a_picture() -> None:
    data = encoded(PIXELS, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert encoded_image(uri, Path(), "row 7") == data
    for broken in ("data:image/png,abc", "data:image/png;base64,a*b", "data:"):
        with pytest.raises(DataError, match="row 7: the image 'data:"):
            encoded_image(broken, Path(), "row 7")


@pytest.mark.parametrize("path", ["a\0b.png", "\ud800.png", "x" * 5000, "https://example.org/a.png", ""])
def test_a_path_that_no_file_can_have(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 7: the image .* does not open"):
        encoded_image(path, tmp_path, "row 7")
