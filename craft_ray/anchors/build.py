"""Building a cache, without Ray: its identity, its estimated size, one shard, and the manifest at the end.

`craft_pipelines.anchors` runs `build_shard` in parallel; everything that decides content is here.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from craft_ray.anchors.manifest import (
    FORMAT,
    SHARDS,
    Identity,
    Manifest,
    Plan,
    Shard,
    write_manifest,
)
from craft_ray.anchors.schema import NUMPY, ROW_GROUP, CacheSchema, StoredLogits
from craft_ray.anchors.teacher import Prepared, Teacher, stored_input
from craft_ray.config import AnchorsConfig, Experiment
from craft_ray.config.modes import stores
from craft_ray.data.source import Source
from craft_ray.errors import CacheRefused, ConfigError
from craft_ray.method.pooling import is_mean, vector_count
from craft_ray.models.base import Model, resolve_layers
from craft_ray.models.capabilities import logits_model, token_model
from craft_ray.storage.files import checksum, new_file
from craft_ray.storage.lock import exclusive_lock
from craft_ray.storage.paths import ObjectPath, StoragePath, readable

ESTIMATE_ROWS = 32


@contextmanager
def only_writer(folder: StoragePath) -> Iterator[None]:
    """Let one process at a time write a cache: two would delete each other's half-written files.

    Raises:
        CacheRefused: another process is writing it.
        ConfigError: the folder is a whole bucket, next to which there is no room for a lock.
    """
    if isinstance(folder, ObjectPath) and len(folder.key.parts) == 1:
        raise ConfigError(f"craft.anchor_cache_dir is {folder}, a whole bucket: name a folder in it, {folder}/anchors")
    refusal = CacheRefused(f"another process is writing the cache in {folder}: wait until it is done")
    with exclusive_lock(folder.with_name(f".{folder.name}.lock"), refusal):
        yield


class Content(Protocol):
    """What the identity needs of anchor inputs: a source, or a folder of legacy shards."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def features(self) -> Mapping[str, tuple[int, ...]] | None: ...

    @property
    def has_conversations(self) -> bool: ...

    @property
    def has_image_lists(self) -> bool: ...

    @property
    def has_responses(self) -> bool: ...

    def __len__(self) -> int: ...


def identity_of(experiment: Experiment, model: Model, source: Content) -> Identity:
    """The identity of the cache that this experiment builds.

    Raises:
        ConfigError: the model has no such layers, or does not provide such anchors.
    """
    anchors = experiment.anchors
    assert anchors is not None
    try:
        layers = resolve_layers(anchors.layers, model.num_hidden_states)
    except ValueError as error:
        raise ConfigError(f"anchors.layers: {error}") from None
    positions = anchors.positions or model.default_positions
    model.check_anchors(anchors.modes, positions)
    if stores(anchors.modes, "response"):
        token_model(model)
        if not source.has_responses:
            raise ConfigError(
                "anchors.modes has replay, which needs the data's responses, but anchors.source.columns.response "
                "names no column: specify one, or leave replay out"
            )
    logits = stored_logits(anchors, model) if stores(anchors.modes, "logits") else None
    with_suffix = stores(anchors.modes, "suffix") or "suffix" in (*positions, *(logits.positions if logits else ()))
    return Identity(
        teacher=model.weights_fingerprint(),
        kind=model.kind,
        preprocessor=model.preprocessor_fingerprint(),
        precision=experiment.train.precision,
        modes=anchors.modes,
        layers=layers,
        num_hidden_states=model.num_hidden_states,
        positions=positions,
        hidden_size=model.hidden_size,
        dtype=anchors.dtype,
        inputs=_inputs(source),
        # Without suffix tokens these two have no effect.
        suffix_from=anchors.suffix_from if with_suffix else "none",
        max_new_tokens=anchors.max_new_tokens if with_suffix else 0,
        logits=logits,
        skills=tuple(experiment.skills) or None,
        source=source.fingerprint,
        rows=len(source),
    )


def _inputs(source: Content) -> Literal["raw", "images", "messages", "frames"]:
    """How the cache stores the anchors of a source."""
    if source.features is not None:
        return "frames"
    if source.has_conversations:
        return "messages"
    return "images" if source.has_image_lists else "raw"


def stored_logits(anchors: AnchorsConfig, model: Model) -> StoredLogits:
    """What mode `logits` stores from this model.

    Raises:
        ConfigError: its logits cannot be read, k exceeds its vocabulary, or a position is not one of single tokens.
    """
    vocabulary, asked = logits_model(model).vocabulary, anchors.logits
    if asked.k > vocabulary:
        raise ConfigError(f"anchors.logits.k is {asked.k}, the model's vocabulary has {vocabulary} tokens: lower k")
    positions = asked.positions or model.default_positions
    for position in positions:
        if is_mean(position):
            raise ConfigError(
                f"anchors.logits.positions has {position}, a mean over tokens, but a next token follows a single one: "
                f"choose e.g. suffix or all"
            )
    return StoredLogits(k=asked.k, temperature=asked.temperature, positions=positions, vocabulary=vocabulary)


@dataclass(frozen=True)
class Estimate:
    """Expected size of a cache, from some of its rows."""

    bytes: int
    vectors_per_row: float
    tokens_per_row: float
    """Tokens with logits."""


def estimate(model: Model, source: Source, schema: CacheSchema, anchors: AnchorsConfig) -> Estimate:
    """Bytes of the finished cache, before anything is written. Suffixes that are yet to be generated count with their
    maximum length."""
    rows = min(ESTIMATE_ROWS, len(source))
    # Spread over the source: data are often sorted, so that the first rows are alike.
    samples = [source[i * len(source) // rows] for i in range(rows)]
    longest = [0] * anchors.max_new_tokens
    counts, tokens, size = 0, 0, 0
    for sample in samples:
        own = schema.has_response or (schema.has_suffix and anchors.suffix_from == "response")
        response = token_model(model).response_tokens(sample) if own else []
        suffix = response if anchors.suffix_from == "response" else longest
        features = token_model(model).preprocess(sample, suffix) if schema.has_suffix else model.preprocess(sample)
        if schema.has_hidden:
            counts += sum(vector_count(features.layout, position) for position in schema.positions)
        if schema.logits is not None:
            tokens += sum(vector_count(features.layout, position) for position in schema.logits.positions)
        prompt, image = stored_input(sample)
        size += len(image or b"") + (len(sample.frame.to_bytes()) if sample.frame else 0)
        stored_tokens = len(suffix) * schema.has_suffix + len(response) * schema.has_response
        size += len(prompt.encode()) + len(sample.id) + 4 * stored_tokens
    size += counts * schema.vector_size * NUMPY[schema.dtype].itemsize
    if schema.logits is not None:
        size += tokens * schema.logits.token_bytes(schema.dtype)
    empty = pa.BufferOutputStream()
    pq.write_table(schema.arrow().empty_table(), empty)
    shards = math.ceil(len(source) / anchors.rows_per_shard)
    total = size / rows * len(source) + shards * empty.tell()
    return Estimate(bytes=round(total), vectors_per_row=counts / rows, tokens_per_row=tokens / rows)


def build_shard(teacher: Teacher, source: Source, rows: Sequence[int], path: StoragePath) -> None:
    """Run the teacher over some rows and write them as one Parquet file, which appears when it is complete."""
    groups = (prepare(teacher.model, source, group) for group in row_groups(rows))
    write_shard(path, teacher.schema, map(teacher.table, groups))


def row_groups(rows: Sequence[int]) -> list[Sequence[int]]:
    """The rows of a shard in the parts that are read, computed and written at once."""
    return [rows[start : start + ROW_GROUP] for start in range(0, len(rows), ROW_GROUP)]


def prepare(model: Model, source: Source, rows: Sequence[int]) -> Prepared:
    """Read and preprocess some anchors.

    Raises:
        DataError: a row cannot be read, or the model cannot take it.
    """
    return Prepared.of(model, [source[row] for row in rows])


def write_shard(path: StoragePath, schema: CacheSchema, row_groups: Iterable[pa.Table]) -> None:
    """One Parquet file, which appears when it is complete."""
    arrow = schema.arrow()
    packed = ("id", "prompt", "image_bytes", "input_ids", "skill", "suffix", "response")
    nested = [name for name in arrow.names if pa.types.is_list(arrow.field(name).type) and name not in packed]
    dense = [f"{name}.list.element.list.element" for name in nested]
    with (
        new_file(path) as temporary,
        pq.ParquetWriter(
            temporary,
            arrow,
            # Encoded images, hidden states and log-probabilities do not compress.
            compression={
                **dict.fromkeys(packed, "zstd"),
                **dict.fromkeys(["image", "frame", "pixel_values", *dense], "none"),
            },
            use_dictionary=False,  # hidden states do not repeat; a dictionary and statistics only cost
            write_statistics=False,
        ) as writer,
    ):
        for table in row_groups:
            writer.write_table(table)


def finished_shards(folder: StoragePath, plan: Plan, ids: Sequence[str]) -> dict[str, Shard]:
    """The shards of a plan that are complete in the folder; shards that do not match the plan are refused."""
    done = {}
    for name, rows in plan.shards():
        path = folder / SHARDS / name
        if not path.exists():
            continue
        try:
            found = pq.read_table(readable(path), columns=["id"])["id"].to_pylist()
        except (OSError, ValueError) as error:
            raise CacheRefused(f"{path} is damaged ({error}): delete it and build again") from None
        if found != list(ids[rows.start : rows.stop]):
            raise CacheRefused(f"{path} holds other rows than the plan says: delete it and build again")
        done[name] = Shard(name=name, rows=len(rows), bytes=path.stat().st_size, blake3=checksum(path))
    return done


def finish(folder: StoragePath, plan: Plan, ids: Sequence[str]) -> Manifest:
    """Check that every row is present once, and write the manifest."""
    shards = finished_shards(folder, plan, ids)
    missing = [name for name, _ in plan.shards() if name not in shards]
    if missing:
        raise CacheRefused(f"{len(missing)} shards of {folder} are missing (e.g. {missing[0]}): build again")
    manifest = manifest_of(folder, plan.identity, [shards[name] for name, _ in plan.shards()])
    write_manifest(folder, manifest)
    return manifest


def manifest_of(folder: StoragePath, identity: Identity, shards: Sequence[Shard]) -> Manifest:
    """The manifest of a complete set of shards."""
    return Manifest(
        format=FORMAT,
        fingerprint=identity.fingerprint,
        identity=identity,
        shards=tuple(shards),
        vectors=sum(_count_vectors(folder / SHARDS / shard.name, identity.schema) for shard in shards),
        written_by={p: importlib.metadata.version(p) for p in ("craft-ray", "torch", "transformers", "pyarrow")},
    )


def full_suffixes(folder: StoragePath, manifest: Manifest) -> int:
    """Number of anchors whose suffix the teacher continued up to `max_new_tokens`."""
    limit = manifest.identity.max_new_tokens
    if manifest.identity.suffix_from != "teacher":
        return 0
    shards = [readable(folder / SHARDS / shard.name) for shard in manifest.shards]
    suffixes = (pq.read_table(shard, columns=["suffix"])["suffix"] for shard in shards)
    return sum(pc.sum(pc.equal(pc.list_value_length(column), limit)).as_py() for column in suffixes)


def _count_vectors(path: StoragePath, schema: CacheSchema) -> int:
    if not schema.has_hidden:
        return 0
    total, metadata = 0, pq.read_metadata(readable(path))
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if chunk.path_in_schema.startswith("hidden_"):
                total += chunk.num_values // schema.vector_size
    return total
