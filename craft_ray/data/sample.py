"""One sample: what every stage uses, whether it trains, anchors or evaluates."""

from __future__ import annotations

from dataclasses import dataclass

from craft_ray.data.frame import Frame


@dataclass(frozen=True)
class Sample:
    """A question with its answer, if there is one; or a moment of a robot's episode, with the task as the prompt."""

    id: str
    prompt: str
    image: bytes | None = None
    """An encoded image (PNG, JPEG)."""
    response: str | None = None
    choices: tuple[str, ...] | None = None
    frame: Frame | None = None
