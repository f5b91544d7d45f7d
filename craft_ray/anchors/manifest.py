"""The manifest: the identity of a cache, and a checksum of every shard. Written last, so it means complete.

Identity is what decides the numbers: teacher, preprocessor, arithmetic, layers, positions, storage type, source and
selection. Paths, hosts and numbers of workers do not, and are not part of it.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from craft_ray.anchors.schema import CacheSchema, StoredLogits
from craft_ray.errors import CacheRefused
from craft_ray.models.fingerprint import json_fingerprint
from craft_ray.storage.files import write_atomically
from craft_ray.storage.paths import StoragePath

FORMAT = 1
LAYER_DEFINITION = (
    "index into the hidden states: 0 = embeddings, k = output of block k, the last one after the final norm"
)
MANIFEST, PLAN, SHARDS = "manifest.json", "plan.json", "shards"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Frozen):
    """What decides the numbers in a cache."""

    teacher: str
    """Hash of the teacher's weights."""
    kind: str
    preprocessor: str
    precision: str
    modes: tuple[str, ...]
    layers: tuple[int, ...]
    """Resolved indices, none negative."""
    num_hidden_states: int
    layer_definition: str = LAYER_DEFINITION
    positions: tuple[str, ...]
    hidden_size: int
    dtype: str
    rounded_to: str | None = None
    """The type in which the vectors of an imported cache were stored before, if it is coarser than `dtype`."""
    inputs: Literal["raw", "images", "messages", "frames", "tensors"]
    pixel_shape: tuple[int, ...] | None = None
    """Shape of one sample's pixel_values, if inputs are tensors."""
    suffix_from: str
    max_new_tokens: int
    logits: StoredLogits | None = None
    skills: tuple[str, ...] | None = None
    """Names of the old skills that anchors belong to; None if they all belong to one without a name."""
    source: str
    """Hash of the anchor inputs."""
    rows: int

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without logits, or names of skills, there is no such entry: so a cache keeps the fingerprint that it always
        had."""
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if key not in ("logits", "skills") or value is not None}

    @property
    def fingerprint(self) -> str:
        facts = self.model_dump(mode="json")
        if self.rounded_to is None:
            del facts["rounded_to"]  # caches from before there was this key keep their identity
        return json_fingerprint(facts)

    @property
    def imported(self) -> bool:
        """Whether the cache was made of earlier shards: its rows cannot be computed again from raw inputs."""
        return self.inputs == "tensors"

    @property
    def renewal(self) -> str:
        """How the whole cache is made again, for messages."""
        if self.imported:
            return "delete its folder and run 'craft-ray anchors import' again"
        return "build the cache again"

    @property
    def rounding(self) -> str:
        """The coarsest type that the vectors were stored in, which decides how closely they can be reproduced."""
        return self.rounded_to or self.dtype

    @property
    def schema(self) -> CacheSchema:  # type: ignore[override]  # hides a method that pydantic has deprecated
        return CacheSchema(
            self.modes, self.positions, self.layers, self.hidden_size, self.dtype, self.inputs, self.logits,
            with_skills=self.skills is not None,
        )  # fmt: skip


class Shard(_Frozen):
    name: str
    rows: int
    bytes: int
    blake3: str


class Manifest(_Frozen):
    format: int
    fingerprint: str
    identity: Identity
    shards: tuple[Shard, ...]
    vectors: int
    """Total number of vectors, over rows and positions."""
    written_by: dict[str, str]
    """Versions of the libraries that built it."""

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def content(self) -> str:
        """Hash of identity and content: the key for copies of the cache."""
        return json_fingerprint([self.fingerprint, [shard.blake3 for shard in self.shards]])


class Plan(_Frozen):
    """What a build is to write; in the folder from the start, so that the build can be resumed."""

    identity: Identity
    rows_per_shard: int

    def shards(self) -> list[tuple[str, range]]:
        """Name and rows of every shard."""
        size, rows = self.rows_per_shard, self.identity.rows
        return [
            (f"shard-{number:05d}.parquet", range(start, min(start + size, rows)))
            for number, start in enumerate(range(0, rows, size))
        ]


def write_manifest(folder: StoragePath, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=2))


def write_plan(folder: StoragePath, plan: Plan) -> None:
    write_atomically(folder / PLAN, plan.model_dump_json(indent=2))


def read_plan(folder: StoragePath) -> Plan | None:
    try:
        return Plan.model_validate_json((folder / PLAN).read_text())
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError):
        raise CacheRefused(f"{folder / PLAN} is damaged: delete the folder and build the cache again") from None


def check_same(folder: StoragePath, found: Identity, wanted: Identity, what: str) -> None:
    """Check that the cache in a folder is the one that a command is about to write there.

    Args:
        what: the command and its verb, for the message.

    Raises:
        CacheRefused: naming both sides of the first difference.
    """
    ours, theirs = wanted.model_dump(), found.model_dump()
    # In the identity's order: a key may be absent on either side.
    key = next((key for key in Identity.model_fields if ours.get(key) != theirs.get(key)), None)
    if key is not None:
        raise CacheRefused(
            f"{folder} holds a cache {_with(key, theirs)}, this {what} one {_with(key, ours)}: choose another "
            f"craft.anchor_cache_dir, or delete the folder"
        )


def _with(key: str, facts: dict[str, Any]) -> str:
    return f"without {key}" if facts.get(key) is None else f"with {key} {facts[key]}"


def is_complete(folder: StoragePath) -> bool:
    """Whether the folder holds a finished cache. Its files are checked when it is read."""
    return (folder / MANIFEST).exists()


def read_manifest(folder: StoragePath) -> Manifest:
    """The manifest of a complete cache.

    Raises:
        CacheRefused: there is none, it is half-written, of another format, or damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        if (folder / PLAN).exists():
            raise CacheRefused(
                f"the anchor cache in {folder} is half-written, a build started and did not finish: run "
                f"'craft-ray anchors build' again, it resumes where it stopped"
            )
        raise CacheRefused(f"there is no anchor cache in {folder}: build one with 'craft-ray anchors build'")
    try:
        tree: dict[str, Any] = json.loads(path.read_text())
        if tree.get("format") != FORMAT:
            raise CacheRefused(
                f"{path} has format {tree.get('format')}, this version reads format {FORMAT}: build the cache again"
            )
        manifest = Manifest.model_validate(tree)
    except (ValidationError, ValueError, AttributeError):
        raise CacheRefused(f"{path} is damaged: delete the folder and build the cache again") from None
    if manifest.identity.fingerprint != manifest.fingerprint:
        raise CacheRefused(
            f"{path} was changed by hand: its identity hashes to {manifest.identity.fingerprint[:12]}, it says "
            f"{manifest.fingerprint[:12]}; build the cache again"
        )
    return manifest
