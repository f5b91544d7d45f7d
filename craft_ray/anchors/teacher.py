"""The teacher over anchors: hidden states at the chosen layers and positions, and its own greedy suffix tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from craft_ray.anchors.schema import NUMPY, CacheSchema, hidden_column, vectors_array
from craft_ray.config import AnchorsConfig
from craft_ray.data.sample import Sample
from craft_ray.errors import CraftError, DataError
from craft_ray.method.pooling import vector_count
from craft_ray.models.base import Features, Model


@dataclass(frozen=True)
class Teacher:
    """A model with what of it is cached."""

    model: Model
    schema: CacheSchema
    config: AnchorsConfig

    def table(self, samples: Sequence[Sample]) -> pa.Table:
        """The rows of the cache for these samples, in their order."""
        self.model.module.eval()
        prompts = [self.model.preprocess(sample) for sample in samples]
        columns: dict[str, pa.Array | list] = {
            "id": [s.id for s in samples],
            "image": [s.image for s in samples],
            "prompt": [s.prompt for s in samples],
        }
        suffixes: list[list[int]] = [[] for _ in samples]
        if self.schema.has_suffix:
            suffixes = self.suffixes(samples, prompts)
            columns["suffix"] = suffixes
        if self.schema.has_hidden:
            features = prompts
            if "suffix" in self.schema.positions:
                features = [self.model.preprocess(s, t) for s, t in zip(samples, suffixes, strict=True)]
            for position, rows in self.vectors([s.id for s in samples], features).items():
                columns[hidden_column(position)] = vectors_array(rows, self.schema.vector_size, self.schema.dtype)
        return pa.table(columns, schema=self.schema.arrow())

    def suffixes(self, samples: Sequence[Sample], prompts: Sequence[Features]) -> list[list[int]]:
        """Suffix tokens of each sample: the teacher's greedy ones, or the response's."""
        if self.config.suffix_from == "response":
            return [self.model.response_tokens(sample) for sample in samples]
        result: list[list[int]] = [[] for _ in samples]
        for chosen in _by_length(prompts, self.config.batch_size):
            generated = self.model.generate([prompts[i] for i in chosen], self.config.max_new_tokens)
            for i, tokens in zip(chosen, generated, strict=True):
                result[i] = tokens
        return result

    def vectors(self, ids: Sequence[str], features: Sequence[Features]) -> dict[str, list[np.ndarray]]:
        """For each position, the vectors [n, L * D] of each sample, in the storage type."""
        result: dict[str, list[np.ndarray]] = {p: [np.empty(0)] * len(features) for p in self.schema.positions}
        for row, per_position in self._forward(features):
            for position, vectors in per_position.items():
                result[position][row] = self._stored(vectors, ids[row])
        return result

    @torch.inference_mode()
    def _forward(self, features: Sequence[Features]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for chosen in _by_length(features, self.config.batch_size):
            layouts = [features[i].layout for i in chosen]
            batch = self.model.collate([features[i] for i in chosen], self.schema.positions).to(self.model.device)
            assert batch.pooling is not None
            pooled = batch.pooling(self.model.hidden_states(batch, self.schema.layers))
            values_BVLD = pooled.values_BLVD.transpose(1, 2).float().cpu().numpy()
            for place, row in enumerate(chosen):
                start, found = 0, {}
                for position in self.schema.positions:
                    most = max(vector_count(layout, position) for layout in layouts)
                    count = vector_count(layouts[place], position)
                    found[position] = values_BVLD[place, start : start + count].reshape(count, -1)
                    start += most
                yield row, found

    def _stored(self, vectors: np.ndarray, sample_id: str) -> np.ndarray:
        if not np.isfinite(vectors).all():
            raise DataError(f"the teacher's hidden states of anchor {sample_id} are not finite: check the model and the input")
        limit = np.finfo(NUMPY[self.schema.dtype]).max
        largest = np.abs(vectors).max(initial=0.0)
        if largest > limit:
            raise CraftError(
                f"a hidden state of anchor {sample_id} is {largest:.3g}, {self.schema.dtype} ends at {limit:.3g}: "
                f"set anchors.dtype to float32"
            )
        return vectors.astype(NUMPY[self.schema.dtype])


def _by_length(features: Sequence[Features], batch_size: int) -> list[list[int]]:
    """Batches of similar length, so that little is padded."""
    order = sorted(range(len(features)), key=lambda i: features[i].layout.length)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
