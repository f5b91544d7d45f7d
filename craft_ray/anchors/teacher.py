"""The teacher run on anchors: hidden states at the chosen layers and positions, greedy suffix tokens, logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from craft_ray.anchors.forward import (
    Pooled,
    by_length,
    packed_logits,
    packed_vectors,
    padded_logits,
    padded_vectors,
    tokens_per_pack,
)
from craft_ray.anchors.schema import (
    CacheSchema,
    StoredLogits,
    hidden_column,
    log_probs_column,
    tokens_column,
    vectors_array,
)
from craft_ray.anchors.storage import stored
from craft_ray.config import AnchorsConfig
from craft_ray.data.sample import Sample
from craft_ray.method.divergence import class_log_probs, top_tokens
from craft_ray.models.base import Features, Model, evaluating
from craft_ray.models.capabilities import logits_model, packing_model, token_model


def stored_input(sample: Sample) -> tuple[str, bytes | None]:
    """Prompt and image as a row of the cache holds them; several images are concatenated."""
    if sample.conversation is not None:
        return sample.conversation.stored()
    return sample.prompt, sample.image if sample.images is None else b"".join(sample.images)


@dataclass(frozen=True)
class Prepared:
    """Some anchors, and their prompts as tensors on the host."""

    samples: Sequence[Sample]
    prompts: Sequence[Features]

    @staticmethod
    def of(model: Model, samples: Sequence[Sample]) -> Prepared:
        return Prepared(samples, [model.preprocess(sample) for sample in samples])


@dataclass(frozen=True)
class Teacher:
    """A model, and what the cache stores from it."""

    model: Model
    schema: CacheSchema
    config: AnchorsConfig
    passed: Callable[[float], None] = lambda _: None
    """Receives, after each forward pass, how many anchors it has completed; of an anchor that needs several passes,
    each counts as its part."""

    @property
    def passes(self) -> int:
        """How often the model is run on an anchor; a generated suffix counts once."""
        generated = self.schema.has_suffix and self.config.suffix_from == "teacher"
        hidden = len(self.schema.positions) if self.schema.has_hidden else 0
        return generated + hidden + (len(self.schema.logits.positions) if self.schema.logits is not None else 0)

    @cached_property
    def pack_tokens(self) -> int:
        """Tokens per pack; 0 means padding."""
        return tokens_per_pack(self.model, self.config)

    def table(self, anchors: Prepared) -> pa.Table:
        """The rows of the cache for these anchors, in their order."""
        samples, prompts = anchors.samples, anchors.prompts
        names = [s.where for s in samples]
        inputs = [stored_input(sample) for sample in samples]
        columns: dict[str, pa.Array | list] = {
            "id": [s.id for s in samples],
            "prompt": [prompt for prompt, _ in inputs],
        }
        if self.schema.inputs == "frames":
            columns["frame"] = [s.frame and s.frame.to_bytes() for s in samples]
        else:
            columns["image"] = [image for _, image in inputs]
        if self.schema.inputs == "images":
            columns["image_bytes"] = [[len(image) for image in sample.pictures or ()] for sample in samples]
        if self.schema.with_skills:
            columns["skill"] = [s.skill for s in samples]
        if self.schema.has_response:
            columns["response"] = [token_model(self.model).response_tokens(sample) for sample in samples]
        extended = prompts
        with evaluating(self.model.module):
            if self.schema.has_suffix:
                suffixes = columns["suffix"] = self.suffixes(samples, prompts)
                if self.schema.reads_suffix:
                    # Decoding an image is expensive, so its prompt is extended and not preprocessed again.
                    model = token_model(self.model)
                    extended = [model.with_suffix(*one) for one in zip(prompts, suffixes, names, strict=True)]
            if self.schema.has_hidden:
                features = extended if "suffix" in self.schema.positions else prompts
                for position, rows in self.vectors(names, features).items():
                    columns[hidden_column(position)] = vectors_array(rows, self.schema.vector_size, self.schema.dtype)
            if self.schema.logits is not None:
                features = extended if "suffix" in self.schema.logits.positions else prompts
                columns |= self.likeliest(names, features, self.schema.logits)
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
            self.passed(len(chosen) / self.passes)
        return result

    @torch.inference_mode()
    def vectors(self, names: Sequence[str], features: Sequence[Features]) -> dict[str, list[np.ndarray]]:
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
            for row, vectors in zip(pooled.rows, self._split(pooled, names), strict=True):
                result[pooled.position][row] = vectors
            self.passed(len(pooled.rows) / self.passes)
        return result

    @torch.inference_mode()
    def likeliest(self, names: Sequence[str], features: Sequence[Features], what: StoredLogits) -> dict[str, pa.Array]:
        """The columns of the most likely next tokens and their log-probabilities.

        Raises:
            DataError: a logit is not a number.
        """
        columns: dict[str, pa.Array] = {}
        for position in what.positions:
            if self.pack_tokens:
                passes = packed_logits(packing_model(self.model), features, position, self.pack_tokens)
            else:
                passes = padded_logits(logits_model(self.model), features, position, self.config.batch_size)
            tokens, log_probs = ([np.empty(0)] * len(features) for _ in range(2))
            for rows, counts, logits_NV in passes:
                assert logits_NV.shape[1] == what.vocabulary, "a model has as many logits as it says"
                tokens_NK = top_tokens(logits_NV, what.k)
                log_probs_NC = class_log_probs(logits_NV, tokens_NK, what.temperature)
                owners, ends = [names[row] for row in rows], np.cumsum(counts)[:-1]
                values = stored(log_probs_NC, owners, counts, self.schema.dtype, "logits")
                for row, own, likely in zip(
                    rows, np.split(tokens_NK.cpu().numpy(), ends), np.split(values, ends), strict=True
                ):
                    tokens[row], log_probs[row] = own, likely
                self.passed(len(rows) / self.passes)
            columns[tokens_column(position)] = vectors_array(tokens, what.k, what.token_type)
            columns[log_probs_column(position)] = vectors_array(log_probs, what.classes, self.schema.dtype)
        return columns

    def _split(self, pooled: Pooled, names: Sequence[str]) -> list[np.ndarray]:
        owners = [names[row] for row in pooled.rows]
        values = stored(pooled.values_NF, owners, pooled.counts, self.schema.dtype, "hidden states")
        return np.split(values, np.cumsum(pooled.counts)[:-1])
