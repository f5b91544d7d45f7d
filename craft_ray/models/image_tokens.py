"""Image tokens in a prompt that was stored without them, where a processor would put them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from craft_ray.models.readings import Reading


def image_reading(processor: Any, ids_S: np.ndarray, picture: tuple[int, int]) -> Reading | None:
    """How a processor completes a prompt that has no image tokens, found by giving it the prompt's text.

    Args:
        ids_S: the tokens of a prompt.
        picture: height and width of its image.

    Returns:
        None if the processor has no mark for an image, or what it makes of the text does not contain these tokens.
    """
    tokenizer, mark = processor.tokenizer, getattr(processor, "image_token", None)
    if mark is None:
        return None
    text = tokenizer.decode(ids_S.tolist(), skip_special_tokens=True)
    blank = Image.new("RGB", (picture[1], picture[0]))
    for prompt in dict.fromkeys([text, text.rstrip("\n")]):  # some processors end a prompt with a line break
        encoded = processor(images=[blank], text=[mark + prompt])["input_ids"]
        whole = [int(token) for token in np.asarray(encoded).reshape(-1)]
        for at in (0, 1):  # the image tokens come first, or right after the first token
            reading = _completed(whole, ids_S.tolist(), at)
            if reading is not None:
                return reading
    return None


def _completed(whole: list[int], ids: list[int], at: int) -> Reading | None:
    """The tokens that `whole` has more than `ids`: after the first `at` of them, and at the end."""
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
