"""Reading a cache: refuse what is damaged or does not match, expand it once per node, and return anchors by row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from craft_ray.anchors.manifest import SHARDS, Manifest, read_manifest
from craft_ray.anchors.ragged import Ragged, write_ragged
from craft_ray.anchors.schema import NUMPY, hidden_column, log_probs_column, tokens_column
from craft_ray.data.conversation import Conversation
from craft_ray.data.frame import Frame
from craft_ray.data.images import split_bytes
from craft_ray.data.sample import Sample
from craft_ray.errors import CacheRefused
from craft_ray.storage.files import checksum, new_folder
from craft_ray.storage.node_cache import filled_once, node_cache
from craft_ray.storage.paths import ObjectPath, StoragePath, copy_tree

BYTES = np.dtype("u1")
INT32 = np.dtype("<i4")


def check_shards(folder: StoragePath, manifest: Manifest) -> None:
    """Check the size and checksum of every shard.

    Raises:
        CacheRefused: a shard is missing, truncated, or differs in a single bit.
    """
    check_sizes(folder, manifest)
    for shard in manifest.shards:
        path = folder / SHARDS / shard.name
        found = checksum(path)
        if found != shard.blake3:
            raise CacheRefused(
                f"{path} is damaged: its checksum is {found[:12]}, the manifest says {shard.blake3[:12]}; "
                f"{_rewritten(manifest)}"
            )


def check_sizes(folder: StoragePath, manifest: Manifest) -> None:
    """Check that every shard is complete, without reading it.

    Raises:
        CacheRefused: one is missing or truncated.
    """
    for shard in manifest.shards:
        path = folder / SHARDS / shard.name
        if not path.exists():
            raise CacheRefused(f"{path} is missing, the manifest names it: {manifest.identity.renewal}")
        size = path.stat().st_size
        if size != shard.bytes:
            raise CacheRefused(f"{path} has {size} bytes, the manifest says {shard.bytes}: {_rewritten(manifest)}")


def _rewritten(manifest: Manifest) -> str:
    """How a shard is written again: an import writes all of them, or none."""
    if manifest.identity.imported:
        return f"the cache was imported, {manifest.identity.renewal}"
    return "delete it and run 'craft-ray anchors build', which writes this shard again"


INPUTS = {
    "raw": ("image", "prompt"),
    "images": ("image", "image_bytes", "prompt"),
    "messages": ("image", "prompt"),
    "frames": ("frame", "prompt"),
    "tensors": ("input_ids", "pixel_values"),
}
"""The columns that hold an anchor's input."""


class AnchorSet:
    """The anchors of a complete, matching cache, by row. Open it with `open_anchors`."""

    def __init__(self, folder: StoragePath, manifest: Manifest, expanded: Path) -> None:
        self.folder = folder
        self.identity = manifest.identity
        self.fingerprint = manifest.fingerprint
        schema = manifest.identity.schema
        self._ids = Ragged(expanded / "id", BYTES)
        self._inputs = {
            name: Ragged(expanded / name, INT32 if name in ("input_ids", "image_bytes") else BYTES)
            for name in INPUTS[schema.inputs]
        }
        self._skills = Ragged(expanded / "skill", BYTES) if schema.with_skills else None
        self._suffix = Ragged(expanded / "suffix", INT32) if schema.has_suffix else None
        self._response = Ragged(expanded / "response", INT32) if schema.has_response else None
        self._hidden = {
            position: Ragged(expanded / hidden_column(position), NUMPY[schema.dtype], schema.vector_size)
            for position in (schema.positions if schema.has_hidden else ())
        }
        self._likeliest: dict[str, tuple[Ragged, Ragged]] = {}
        if schema.logits is not None:
            token_type, log_prob_type = NUMPY[schema.logits.token_type], NUMPY[schema.dtype]
            self._likeliest = {
                position: (
                    Ragged(expanded / tokens_column(position), token_type, schema.logits.k),
                    Ragged(expanded / log_probs_column(position), log_prob_type, schema.logits.classes),
                )
                for position in schema.logits.positions
            }

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def remedy(self) -> str:
        """What to check if a model does not give what the cache holds."""
        return (
            f"preprocessing, dropout, layers or the teacher is not what the cache was built with; run 'craft-ray "
            f"anchors verify {self.folder} --config CONFIG'"
        )

    def id(self, row: int) -> str:
        return self._ids[row].tobytes().decode()

    def skill(self, row: int) -> str | None:
        """The skill that an anchor belongs to; None in a cache of one skill without a name."""
        return None if self._skills is None else self._skills[row].tobytes().decode()

    def sample(self, row: int) -> Sample:
        """The raw input of an anchor."""
        prompt = self._inputs["prompt"][row].tobytes().decode()
        if self.identity.inputs == "frames":
            return Sample(self.id(row), prompt, frame=Frame.from_bytes(self._inputs["frame"][row].tobytes()))
        image = self._inputs["image"][row]
        if self.identity.inputs == "messages":
            conversation = Conversation.from_stored(prompt, image.tobytes())
            return Sample(self.id(row), conversation.transcript, conversation=conversation)
        if self.identity.inputs == "images":
            images = split_bytes(image.tobytes(), self._inputs["image_bytes"][row].tolist())
            return Sample(self.id(row), prompt, next(iter(images), None), images=images)
        return Sample(id=self.id(row), prompt=prompt, image=image.tobytes() if len(image) else None)

    def tensors(self, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        """input_ids and pixel_values of an imported anchor, which has no raw input."""
        pixels = self._inputs["pixel_values"][row]
        shape = self.identity.pixel_shape
        return self._inputs["input_ids"][row], pixels.view("<f4").reshape(shape) if shape else None

    @property
    def has_suffix(self) -> bool:
        """Whether there are suffix tokens."""
        return self._suffix is not None

    def suffix(self, row: int) -> list[int]:
        assert self._suffix is not None, "the cache has no suffix tokens"
        return [int(token) for token in self._suffix[row]]

    def response(self, row: int) -> list[int]:
        assert self._response is not None, "the cache has no responses"
        return [int(token) for token in self._response[row]]

    def vectors(self, rows: Sequence[int], position: str) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of some rows, [B, V, L, D] in the storage type, and which are real, [B, V]."""
        values, valid = self._hidden[position].gather(rows)
        return values.reshape(*values.shape[:2], len(self.identity.layers), -1), valid

    def likeliest(self, rows: Sequence[int], position: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At the tokens of some rows: the most likely next tokens [B, T, k], the log-probabilities of the classes
        [B, T, C] in the storage type, and which are real [B, T]."""
        (tokens, valid), (log_probs, _) = (column.gather(rows) for column in self._likeliest[position])
        return tokens.reshape(*valid.shape, -1), log_probs.reshape(*valid.shape, -1), valid

    def split(self, holdout: float, seed: int = 0, skill: str | None = None) -> tuple[list[int], list[int]]:
        """Rows to train on and rows held out, decided for each row only by a hash of its id: it stays the same when
        anchors are added or reordered. So the held-out share is `holdout` on average.

        Args:
            skill: only the rows of this skill.

        Raises:
            CacheRefused: one of the two parts would be empty.
        """
        limit = int(holdout * (1 << 64))

        def is_held(row: int) -> bool:
            return int.from_bytes(blake3(f"{seed} {self.id(row)}".encode()).digest(8), "big") < limit

        parts: tuple[list[int], list[int]] = ([], [])
        for row in range(len(self)):
            if skill is None or self.skill(row) == skill:
                parts[is_held(row)].append(row)
        train, held = parts
        if not train or (holdout > 0 and not held):
            of = "" if skill is None else f" of the skill {skill}"
            raise CacheRefused(
                f"the cache in {self.folder} has {len(train) + len(held)} anchors{of}; holding out "
                f"{holdout:.0%} leaves {len(train)} to train on and {len(held)} to validate on: add anchors, or change "
                f"craft.anchor_holdout"
            )
        return train, held


def open_anchors(folder: StoragePath, manifest: Manifest | None = None) -> AnchorSet:
    """Expand the cache on this node unless it is expanded already, check every byte while reading, and map it."""
    manifest = manifest or read_manifest(folder)
    if not manifest.identity.rows:
        raise CacheRefused(f"the anchor cache in {folder} has no anchor: build it from a source that has some")
    with filled_once(manifest.content) as (target, ours):
        if ours:
            with _local_shards(folder, manifest) as local:
                check_shards(local, manifest)
                _expand(local, manifest, target)
    return AnchorSet(folder, manifest, target)


@contextmanager
def _local_shards(folder: StoragePath, manifest: Manifest) -> Iterator[Path]:
    """The folder; for shards in an object store, a local copy that exists during the expansion."""
    if not isinstance(folder, ObjectPath):
        yield folder
        return
    check_sizes(folder, manifest)
    with tempfile.TemporaryDirectory(prefix=".shards-", dir=node_cache()) as temporary:
        (Path(temporary) / SHARDS).mkdir()
        for shard in manifest.shards:
            copy_tree(folder / SHARDS / shard.name, Path(temporary) / SHARDS / shard.name)
        yield Path(temporary)


def _expand(folder: Path, manifest: Manifest, target: Path) -> None:
    schema = manifest.identity.schema.arrow()
    with new_folder(target) as temporary:
        for name in schema.names:
            write_ragged(temporary / name, _chunks(folder, manifest, name))


def _chunks(folder: Path, manifest: Manifest, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One column as flat data and lengths, a row group at a time."""
    for shard in manifest.shards:
        with pq.ParquetFile(folder / SHARDS / shard.name) as file:
            for batch in file.iter_batches(columns=[column]):
                yield _flat(batch.column(0))


def _flat(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    if pa.types.is_string(array.type) or pa.types.is_binary(array.type):
        cells = [cell or b"" for cell in array.cast(pa.binary()).to_pylist()]
        return np.frombuffer(b"".join(cells), BYTES), np.array([len(cell) for cell in cells], dtype=np.int64)
    offsets = array.offsets.to_numpy()
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    while pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False), np.diff(offsets)
