"""The teacher run on anchors: hidden states at the chosen layers and positions, and its greedy suffix tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from craft_ray.anchors.forward import Pooled, by_length, packed_vectors, padded_vectors, tokens_per_pack
from craft_ray.anchors.schema import CacheSchema, hidden_column, vectors_array
from craft_ray.anchors.storage import stored
from craft_ray.config import AnchorsConfig
from craft_ray.data.sample import Sample
from craft_ray.models.base import Features, Model, evaluating
from craft_ray.models.capabilities import packing_model, token_model


def stored_input(sample: Sample) -> tuple[str, bytes | None]:
    """Prompt and image as a row of the cache holds them."""
    return (sample.prompt, sample.image) if sample.conversation is None else sample.conversation.stored()


@dataclass(frozen=True)
class Teacher:
    """A model, and what the cache stores of it."""

    model: Model
    schema: CacheSchema
    config: AnchorsConfig

    @cached_property
    def pack_tokens(self) -> int:
        """Tokens per pack; 0 means padding."""
        return tokens_per_pack(self.model, self.config)

    def table(self, samples: Sequence[Sample]) -> pa.Table:
        """The rows of the cache for these samples, in their order."""
        prompts = [self.model.preprocess(sample) for sample in samples]
        ids = [s.id for s in samples]
        inputs = [stored_input(sample) for sample in samples]
        columns: dict[str, pa.Array | list] = {"id": ids, "prompt": [prompt for prompt, _ in inputs]}
        if self.schema.inputs == "frames":
            columns["frame"] = [s.frame and s.frame.to_bytes() for s in samples]
        else:
            columns["image"] = [image for _, image in inputs]
        features = prompts
        with evaluating(self.model.module):
            if self.schema.has_suffix:
                suffixes = columns["suffix"] = self.suffixes(samples, prompts)
                if "suffix" in self.schema.positions and self.schema.has_hidden:
                    # Decoding an image is expensive, so its prompt is extended and not preprocessed again.
                    model = token_model(self.model)
                    features = [model.with_suffix(*one) for one in zip(prompts, suffixes, ids, strict=True)]
            if self.schema.has_hidden:
                for position, rows in self.vectors(ids, features).items():
                    columns[hidden_column(position)] = vectors_array(rows, self.schema.vector_size, self.schema.dtype)
        return pa.table(columns, schema=self.schema.arrow())

    def suffixes(self, samples: Sequence[Sample], prompts: Sequence[Features]) -> list[list[int]]:
        """Suffix tokens of each sample: the teacher's greedy ones, or the response's."""
        model = token_model(self.model)
        if self.config.suffix_from == "response":
            return [model.response_tokens(sample) for sample in samples]
        result: list[list[int]] = [[] for _ in samples]
        for chosen in by_length(prompts, self.config.batch_size):
            generated = model.generate([prompts[i] for i in chosen], self.config.max_new_tokens)
            for i, tokens in zip(chosen, generated, strict=True):
                result[i] = tokens
        return result

    @torch.inference_mode()
    def vectors(self, ids: Sequence[str], features: Sequence[Features]) -> dict[str, list[np.ndarray]]:
        """For each position, the vectors [n, L * D] of each anchor, in the storage type.

        Raises:
            DataError: a hidden state is not finite, or too large for the storage type.
        """
        positions, layers = self.schema.positions, self.schema.layers
        if self.pack_tokens:
            pools = packed_vectors(packing_model(self.model), features, positions, layers, self.pack_tokens)
        else:
            pools = padded_vectors(self.model, features, positions, layers, self.config.batch_size)
        result: dict[str, list[np.ndarray]] = {p: [np.empty(0)] * len(features) for p in positions}
        for pooled in pools:
            for row, vectors in zip(pooled.rows, self._split(pooled, ids), strict=True):
                result[pooled.position][row] = vectors
        return result

    def _split(self, pooled: Pooled, ids: Sequence[str]) -> list[np.ndarray]:
        owners = [ids[row] for row in pooled.rows]
        values = stored(pooled.values_NF, owners, pooled.counts, self.schema.dtype)
        return np.split(values, np.cumsum(pooled.counts)[:-1])
