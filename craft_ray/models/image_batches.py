"""The images of several samples as one batch, joined as the model's processor joins them.

A processor returns tensors whose first dimension counts what the model takes one after another: samples (Idefics3,
SmolVLM), images (LLaVA-NeXT), images with their tiles or crops (InternVL, Gemma 3), or patches (Qwen2-VL). In a batch
they follow each other along it, and every other dimension is padded at its end to the largest. No list of models says
that this holds, or with what is padded: a batch that the processor itself makes of images of different shapes and
numbers is compared with the joined tensors of its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from craft_ray.errors import ModelError, first_line

Pictures = Sequence[Image.Image]
Process = Callable[[Sequence[Pictures]], Mapping[str, Tensor]]
"""From the images of each sample to the tensors of the batch that do not belong to tokens."""

SQUARE, WIDE = (32, 32), (2000, 400)
"""Width and height of images that a processor cuts into different numbers of tiles."""
TOLERANCE = 1e-4
"""Images that are resized together may be rounded differently than alone."""


class ImageBatches:
    """Joins the images of samples.

    Args:
        process: the processor, for a batch of samples.
        path: the model's, for errors.
    """

    def __init__(self, process: Process, path: str) -> None:
        self._path = path
        self._fills: dict[str, float] = {}
        self._problem: str | None
        try:
            self._problem = self._learn(process)
        except Exception as error:  # a processor that takes one image a sample can raise anything for several
            self._problem = f"it fails on several images ({type(error).__name__}: {first_line(error)[:200]})"

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """The tensors `name` of some samples as that of their batch.

        Raises:
            ModelError: they differ in shape, and how the processor joins those is not known.
        """
        if self._problem is not None:
            raise ModelError(
                f"model {self._path}: the images of a batch have {name} of different shapes, and what its processor "
                f"makes of those is not what its samples give one by one ({self._problem}): give each sample one "
                f"image, all of one size, or use batches of one sample"
            )
        return joined(parts, self._fills.get(name, 0))[0]

    def _learn(self, process: Process) -> str | None:
        """Compare a batch with its samples, and note what it is padded with; what differs, if anything does."""
        square, wide = (Image.new("RGB", size, (200, 120, 40)) for size in (SQUARE, WIDE))
        samples = [[square], [wide, square]]
        alone = [process([pictures]) for pictures in samples]
        together = process(samples)
        for name, tensor in together.items():
            if not all(name in one for one in alone):
                return f"{name} is in the batch alone"
            expected, real = joined([one[name] for one in alone], 0)
            if tensor.shape != expected.shape:
                return f"{name} is {list(tensor.shape)} in a batch and {list(expected.shape)} one by one"
            if not torch.allclose(tensor[real].float(), expected[real].float(), atol=TOLERANCE, rtol=TOLERANCE):
                return f"{name} has other values in a batch"
            padding = tensor[~real].unique()
            if len(padding) > 1:
                return f"{name} is padded with different values"
            if len(padding):
                self._fills[name] = padding.item()
        return None


def joined(parts: Sequence[Tensor], fill: float) -> tuple[Tensor, Tensor]:
    """Tensors [n_i, ...] concatenated, [sum of n_i, ...], each padded with `fill` at the end of its other
    dimensions, and which entries are real."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_full([sum(map(len, parts)), *shape], fill)
    real, start = torch.zeros(whole.shape, dtype=torch.bool), 0
    for part in parts:
        place = (slice(start, start + len(part)), *(slice(size) for size in part.shape[1:]))
        whole[place], real[place] = part, True
        start += len(part)
    return whole, real
