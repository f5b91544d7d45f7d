"""What a row of the cache holds, as an Arrow schema that every Parquet reader understands.

id              string
image, prompt   the raw input                                           (inputs: raw)
image, image_bytes, prompt: concatenated images, and the bytes of each          (inputs: images)
image, prompt   concatenated images, and the turns as JSON              (inputs: messages)
frame, prompt   the observation of a robot as safetensors, and the task (inputs: frames)
input_ids, pixel_values                                                 (inputs: tensors, imported caches)
skill           string, which of several old skills the anchor belongs to (only with several)
suffix          list<int32>, the suffix tokens                          (token_ce, or the position `suffix`)
response        list<int32>, the data's own response as tokens          (replay)
hidden_<pos>    list<fixed_size_list<float16|float32>[L * D]>, one entry for each vector of that position;
                an entry is the vectors at the cached layers, concatenated
tokens_<pos>    list<fixed_size_list<uint16|int32>[k]>, one entry for each token of that position: the most likely next
                tokens, the most likely first                            (logits)
log_probs_<pos> list<fixed_size_list<float16|float32>[C]>: the log-probabilities of those tokens, and at the end that of
                all others together; without the last one if k is the whole vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from craft_ray.config.modes import stores

ROW_GROUP = 256
"""Rows that the teacher processes at once: sorted by length, run, and written as one row group. It bounds memory."""

ARROW = {"float16": pa.float16(), "float32": pa.float32(), "uint16": pa.uint16(), "int32": pa.int32()}
NUMPY: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "uint16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
}

COARSENESS = ("float32", "float16", "bfloat16")
"""Types of stored vectors, the finest first. Caches are written in the first two, earlier ones also in the third."""

STEP0_TOLERANCE = {
    ("float16", "fp32"): 1e-6,
    ("float32", "fp32"): 1e-8,
    ("bfloat16", "fp32"): 2e-5,
    ("float16", "bf16"): 1e-2,
    ("float32", "bf16"): 1e-2,
    ("bfloat16", "bf16"): 1e-2,
}
"""Largest relative mean square between teacher and untouched student, by (storage, arithmetic). Rounding to float16
causes 4e-8, to bfloat16 2.8e-6. In bf16 arithmetic, a batch of another shape is summed in another order; the same model
gave up to 1e-3."""

STEP0_AGREEMENT = {"fp32": 0.99, "bf16": 0.9}
"""Smallest share of the teacher's greedy tokens that are also the untouched student's most likely ones, by arithmetic.
The rest are near ties: in bf16 the two most likely tokens are often closer than the rounding."""

NOISE_FLOOR = {"float16": 1e-7, "float32": 1e-12, "bfloat16": 6e-6}
"""L_ret below which its gradient comes only from rounding in storage."""


def hidden_column(position: str) -> str:
    return f"hidden_{position}"


def tokens_column(position: str) -> str:
    return f"tokens_{position}"


def log_probs_column(position: str) -> str:
    return f"log_probs_{position}"


class StoredLogits(BaseModel):
    """What mode `logits` stores, as a part of a cache's identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int
    temperature: float
    positions: tuple[str, ...]
    vocabulary: int

    @property
    def classes(self) -> int:
        """Log-probabilities at a token: those of k tokens, and of all others together if there are any."""
        return min(self.k + 1, self.vocabulary)

    @property
    def token_type(self) -> str:
        """Smallest type that holds every token id."""
        return "uint16" if self.vocabulary <= 1 << 16 else "int32"

    def token_bytes(self, dtype: str) -> int:
        """Bytes at one token."""
        return self.k * NUMPY[self.token_type].itemsize + self.classes * NUMPY[dtype].itemsize


@dataclass(frozen=True)
class CacheSchema:
    """The columns of a cache."""

    modes: tuple[str, ...]
    positions: tuple[str, ...]
    layers: tuple[int, ...]
    hidden_size: int
    dtype: str
    inputs: str
    """`raw`, `images`, `messages`, `frames` or `tensors`."""
    logits: StoredLogits | None = None
    with_skills: bool = False

    @property
    def has_hidden(self) -> bool:
        return stores(self.modes, "vectors")

    @property
    def has_suffix(self) -> bool:
        return stores(self.modes, "suffix") or self.reads_suffix

    @property
    def has_response(self) -> bool:
        return stores(self.modes, "response")

    @property
    def reads_suffix(self) -> bool:
        """Whether the teacher is run on suffix tokens after it has generated them."""
        hidden = self.positions if self.has_hidden else ()
        return "suffix" in (*hidden, *(self.logits.positions if self.logits else ()))

    @property
    def vector_size(self) -> int:
        """Numbers of one vector: all cached layers together."""
        return len(self.layers) * self.hidden_size

    def arrow(self) -> pa.Schema:
        fields = [pa.field("id", pa.string(), nullable=False)]
        if self.inputs == "tensors":
            fields += [pa.field("input_ids", pa.list_(pa.int32())), pa.field("pixel_values", pa.binary())]
        else:
            seen = "frame" if self.inputs == "frames" else "image"
            fields += [pa.field(seen, pa.binary()), pa.field("prompt", pa.string())]
            if self.inputs == "images":
                fields.append(pa.field("image_bytes", pa.list_(pa.int32())))
        if self.with_skills:
            fields.append(pa.field("skill", pa.string(), nullable=False))
        if self.has_suffix:
            fields.append(pa.field("suffix", pa.list_(pa.int32())))
        if self.has_response:
            fields.append(pa.field("response", pa.list_(pa.int32())))
        if self.has_hidden:
            vector = pa.list_(ARROW[self.dtype], self.vector_size)
            fields += [pa.field(hidden_column(p), pa.list_(vector)) for p in self.positions]
        if self.logits is not None:
            tokens = pa.list_(ARROW[self.logits.token_type], self.logits.k)
            log_probs = pa.list_(ARROW[self.dtype], self.logits.classes)
            fields += [pa.field(tokens_column(p), pa.list_(tokens)) for p in self.logits.positions]
            fields += [pa.field(log_probs_column(p), pa.list_(log_probs)) for p in self.logits.positions]
        return pa.schema(fields)


def vectors_array(rows: Sequence[np.ndarray], size: int, dtype: str) -> pa.Array:
    """Rows of vectors, each [n, size], as list<fixed_size_list[size]>."""
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    flat = np.concatenate(rows).astype(NUMPY[dtype], copy=False).reshape(-1)
    inner = pa.FixedSizeListArray.from_arrays(pa.array(flat, type=ARROW[dtype]), size)
    return pa.ListArray.from_arrays(pa.array(offsets), inner)
