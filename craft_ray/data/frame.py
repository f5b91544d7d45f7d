"""A moment of a robot's episode, and its form in a file."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from safetensors.numpy import load, save

IMAGE = "image:"
"""Prefix of the images' names in a stored frame."""


@dataclass(frozen=True)
class Frame:
    """What a policy observes at one moment, by feature name, and the actions from then on."""

    images: dict[str, np.ndarray]
    """Camera images, uint8 [height, width, 3]."""
    state: dict[str, np.ndarray]
    """Everything else that is observed, float32 [D]."""
    actions: np.ndarray | None = None
    """The actions from this moment to the end of the episode, float32 [T, D]; not stored."""

    def to_bytes(self) -> bytes:
        """As a safetensors file: the state, and each image as the bytes of a PNG, which is lossless."""
        images = {IMAGE + name: np.frombuffer(_png(array), np.uint8) for name, array in self.images.items()}
        return save(images | {name: np.ascontiguousarray(array) for name, array in self.state.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Frame:
        """The frame that `to_bytes` wrote, without actions."""
        tensors = load(data)
        image_names = {name for name in tensors if name.startswith(IMAGE)}
        return cls(
            images={name.removeprefix(IMAGE): _pixels(tensors[name].tobytes()) for name in sorted(image_names)},
            state={name: array for name, array in sorted(tensors.items()) if name not in image_names},
        )


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)
