"""Image tokens in a prompt that was stored without them, where a processor would put them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from craft_ray.errors import DataError
from craft_ray.models.readings import Reading


def image_reading(processor: Any, ids_S: np.ndarray, picture: Sequence[int]) -> Reading:
    """How a processor completes a prompt that has no image tokens, found by giving it the prompt's text.

    Args:
        ids_S: the tokens of a prompt.
        picture: height and width of its image.

    Raises:
        DataError: the processor has no mark for an image, or what it makes of the text does not contain these tokens.
    """
    tokenizer, mark = processor.tokenizer, getattr(processor, "image_token", None)
    text = tokenizer.decode(ids_S.tolist(), skip_special_tokens=True)
    blank = Image.new("RGB", (picture[1], picture[0]))
    texts = [text, text.rstrip("\n")]  # some processors end a prompt with a line break
    for prompt in dict.fromkeys(texts) if mark else ():
        encoded = processor(images=[blank], text=[mark + prompt])["input_ids"]
        whole = [int(token) for token in np.asarray(encoded).reshape(-1)]
        for at in (0, 1):  # the image tokens come first, or right after the first token
            reading = _completed(whole, ids_S.tolist(), at)
            if reading is not None:
                return reading
    raise DataError(
        f"its input_ids hold no image tokens, and {type(processor).__name__} does not say where they go: what it makes "
        f"of the prompt does not contain these tokens; save input_ids as the processor gives them"
    )


def _completed(whole: list[int], ids: list[int], at: int) -> Reading | None:
    """The tokens of `whole` that `ids` lacks: after the first `at` of them, and at the end."""
    head, rest = ids[:at], ids[at:]
    if not rest or whole[:at] != head:
        return None
    for start in range(at, len(whole) - len(rest) + 1):
        if whole[start : start + len(rest)] == rest:
            inserted, appended = tuple(whole[at:start]), tuple(whole[start + len(rest) :])
            words = f"{len(inserted)} tokens put back for the image" + (
                f", {len(appended)} at the end of the prompt" if appended else ""
            )
            return Reading(words, at, inserted, appended)
    return None
