"""The student's inputs for anchors, by row of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from craft_ray.anchors.reader import AnchorSet
from craft_ray.errors import CacheRefused
from craft_ray.models.base import Batch, Features, Model
from craft_ray.models.capabilities import tensor_model, token_model
from craft_ray.models.features import FeatureCache, FeatureSource


class AnchorInputs:
    """Preprocesses anchors into batches for the student.

    Args:
        with_suffix: whether the cached suffix tokens follow the prompt.
        with_response: whether the data's own responses do.
        cache: features of earlier runs in this process.
    """

    def __init__(
        self,
        model: Model,
        anchors: AnchorSet,
        with_suffix: bool,
        cache: FeatureCache | None = None,
        with_response: bool = False,
    ) -> None:
        self._model = model
        self._anchors = anchors
        self._features = anchor_features(model, anchors, with_suffix, with_response, cache)

    def batch(self, rows: Sequence[int], positions: Sequence[str] | None = None) -> Batch:
        """The anchors of these rows on the host; with `positions`, also the plan that pools their hidden states."""
        return self._model.collate(self._features.batch(rows), positions)

    def check_counts(self, rows: Sequence[int], batch: Batch, cached_BV: Tensor, what: str) -> None:
        """Check that a batch has as many vectors or tokens at its positions as the cache.

        Args:
            cached_BV: which of them the cache has.
            what: what the cache has there, for the message.

        Raises:
            CacheRefused: this run's preprocessing yields another number.
        """
        assert batch.pooling is not None
        if torch.equal(batch.pooling.valid_BV, cached_BV):
            return
        ours, theirs = batch.pooling.valid_BV.sum(1).tolist(), cached_BV.sum(1).tolist()
        row = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), 0)
        raise CacheRefused(
            f"anchor {self._anchors.id(rows[row])} has {theirs[row]} {what} in the cache, this run's preprocessing "
            f"yields {ours[row]}: the cache was built with another preprocessor, build it again"
        )


def anchor_features(
    model: Model,
    anchors: AnchorSet,
    with_suffix: bool = False,
    with_response: bool = False,
    cache: FeatureCache | None = None,
) -> FeatureSource[int]:
    """Preprocessed anchors by row, each made once.

    Args:
        with_suffix: whether the cached suffix tokens follow the prompt.
        with_response: whether the data's own responses do.
        cache: features of earlier runs in this process.
    """
    assert not (with_suffix and with_response)
    follows = "response" if with_response else f"suffix {with_suffix}"
    return (cache or FeatureCache()).source(
        AnchorFeatures(model, anchors, with_suffix, with_response),
        *(anchors.fingerprint, follows, model.sample_fingerprint()),
    )


@dataclass(frozen=True)
class AnchorFeatures:
    """Preprocesses an anchor by its row of the cache, in this process or another one."""

    model: Model
    anchors: AnchorSet
    with_suffix: bool
    with_response: bool

    def __call__(self, row: int) -> Features:
        suffix = self.anchors.suffix(row) if self.with_suffix else None
        if self.with_response:
            suffix = self.anchors.response(row)
        if self.anchors.identity.inputs == "tensors":
            input_ids, pixels = self.anchors.tensors(row)
            return tensor_model(self.model).from_tensors(input_ids, pixels, suffix)
        sample = self.anchors.sample(row)
        return self.model.preprocess(sample) if suffix is None else token_model(self.model).preprocess(sample, suffix)
