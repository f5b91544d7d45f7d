"""Images in every form that data sets use, as encoded bytes; and back to pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from craft_ray.data.cells import cut, shown
from craft_ray.errors import DataError, first_line
from craft_ray.storage.paths import StoragePath, is_object, storage_path


def is_list_of_images(cell: Any) -> bool:
    """Whether a cell holds a list of images, and not one image, which may be an array in nested lists: height, width
    and channel. What nests deeper is a list of arrays."""
    depth, inner = 0, cell
    while isinstance(inner, list):
        depth, inner = depth + 1, next(iter(inner), None)
    return depth > 3 or (depth == 1 and not isinstance(inner, int | float))


def images_in(cell: Any) -> list[Any]:
    """The images of a cell: those of a list of them, a single one, or none."""
    return [] if cell is None else cell if is_list_of_images(cell) else [cell]


def images_of_row(cells: Mapping[str, Any], columns: Sequence[str], where: str) -> list[Any]:
    """The images in some columns of a row, in order. If there are several columns, the last ones may hold nothing.

    Args:
        where: names the sample in an error.

    Raises:
        DataError: an image is missing before another one, or within a list.
    """
    filled = [name for name in columns if cells.get(name) is not None]
    found: list[Any] = []
    for column in columns[: columns.index(filled[-1]) + 1] if filled else ():
        cell = cells.get(column)
        if cell is None:
            raise DataError(
                f"{where}: column '{column}' holds no image, but '{filled[-1]}' behind it does: fill the columns from "
                f"the first on, or remove the row"
            )
        for number, value in enumerate(images_in(cell), 1):
            if value is None:
                raise DataError(
                    f"{where}: image {number} in the list of column '{column}' is null: fix or remove the row"
                )
            found.append(value)
    return found


def split_bytes(data: bytes, sizes: Sequence[int]) -> tuple[bytes, ...]:
    """Split concatenated data into parts of these sizes."""
    ends = [0, *accumulate(sizes)]
    return tuple(data[start:end] for start, end in pairwise(ends))


def encoded_image(value: Any, folder: StoragePath, where: str) -> bytes:
    """An image cell as encoded bytes.

    Args:
        value: a path (relative ones from `folder`), encoded bytes, a `{bytes, path}` pair, or an array of uint8
            (height, width[, channel]), which is encoded losslessly as PNG.
        where: names the sample in an error.
    """
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value.startswith("data:"):
        return _from_data_uri(value, where)
    if isinstance(value, str):
        try:
            return (storage_path(value) if is_object(value) else folder / value).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: no path can have such a character
            reason = getattr(error, "strerror", None) or first_line(error)
            path = value if is_object(value) else str(folder / value)
            raise DataError(f"{where}: the image {cut(path)} does not open ({cut(reason)})") from None
    if isinstance(value, (list, np.ndarray)):
        return _encode_array(value, where)
    raise DataError(
        f"{where}: the image is a {type(value).__name__}; a path, encoded bytes or an array of uint8 is expected"
    )


def _from_data_uri(value: str, where: str) -> bytes:
    """The bytes in `data:image/png;base64,...` (RFC 2397)."""
    head, _, content = value.partition(",")
    if not head.endswith(";base64"):
        raise DataError(f"{where}: the image {shown(value)} is no data URI in base64; fix or remove the row")
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise DataError(f"{where}: the image {shown(value)} does not decode ({error}); fix or remove the row") from None


def _encode_array(value: list[Any] | np.ndarray, where: str) -> bytes:
    try:
        array = np.asarray(value)
    except ValueError:
        raise DataError(f"{where}: the image array has rows of different lengths; fix or remove the row") from None
    if array.dtype.kind not in "uif":
        raise DataError(f"{where}: the image array holds {array.dtype}; numbers from 0 to 255 are expected")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise DataError(
            f"{where}: the image array has shape {array.shape}; (height, width[, channel]) is expected, with 1, 3 or "
            f"4 channels"
        )
    buffer = io.BytesIO()
    Image.fromarray(_bytes_of(array, where)).save(buffer, format="PNG")
    return buffer.getvalue()


def _bytes_of(array: np.ndarray, where: str) -> np.ndarray:
    """The same values as uint8."""
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise DataError(f"{where}: the image array holds NaN or infinity; fix or remove the row")
    if array.min() < 0 or array.max() > 255 or (array != array.astype(np.uint8)).any():
        raise DataError(
            f"{where}: the image array runs from {array.min()} to {array.max()}; whole numbers from 0 to 255 "
            f"are expected, multiply or round it"
        )
    return array.astype(np.uint8)


def decode_image(data: bytes, where: str) -> Image.Image:
    """Encoded bytes as an RGB image, turned upright as its EXIF data says. Of 16 bits a channel, the upper 8 remain, as
    Pillow reduces colours; transparency is left out, as in transformers' `load_image`.

    Raises:
        DataError: the bytes are not an image, or its values are not those of pixels.
    """
    try:
        image = Image.open(io.BytesIO(data))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):  # 32 bits a pixel: Pillow would clip them
            return Image.fromarray(_bytes_of(np.asarray(image), where)).convert("RGB")
        return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # on a damaged file, Pillow can raise anything
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else cut(first_line(error))
        raise DataError(
            f"{where}: its image of {len(data)} bytes does not decode ({reason}); fix or remove the row"
        ) from None
