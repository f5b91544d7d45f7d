"""Images in every form that data sets use, as encoded bytes; and back to pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from craft_ray.errors import DataError
from craft_ray.storage.paths import StoragePath, is_object, storage_path


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
    if isinstance(value, str):
        path = storage_path(value) if is_object(value) else folder / value
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{where}: the image {path} does not open ({error.strerror})") from None
    if isinstance(value, (list, np.ndarray)):
        return _encode_array(value, where)
    raise DataError(
        f"{where}: the image is a {type(value).__name__}; a path, encoded bytes or an array of uint8 is expected"
    )


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
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise DataError(f"{where}: the image array holds NaN or infinity; fix or remove the row")
    if array.min() < 0 or array.max() > 255 or (array != array.astype(np.uint8)).any():
        raise DataError(
            f"{where}: the image array runs from {array.min()} to {array.max()}; whole numbers from 0 to 255 "
            f"are expected, multiply or round it"
        )
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_image(data: bytes, where: str) -> Image.Image:
    """Encoded bytes as an RGB image.

    Raises:
        DataError: the bytes are not an image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(
            f"{where}: its image of {len(data)} bytes does not decode ({reason}); fix or remove the row"
        ) from None
