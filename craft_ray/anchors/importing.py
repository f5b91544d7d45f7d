"""Importing legacy shards as a cache: the same columns, the same manifest, inputs as tensors.

The cache is written to a temporary folder and moved to its path at the very end, after the teacher has been run again
on some rows. So an interruption leaves no cache behind, and an import is repeated by starting it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from craft_ray.anchors.build import identity_of, manifest_of, write_shard
from craft_ray.anchors.legacy import LegacyRows, load_rows
from craft_ray.anchors.legacy_files import ShardFiles
from craft_ray.anchors.manifest import (
    MANIFEST,
    SHARDS,
    Identity,
    Manifest,
    Shard,
    check_same,
    read_manifest,
    write_manifest,
)
from craft_ray.anchors.reading import choose_reading, reproduced_positions
from craft_ray.anchors.schema import COARSENESS, ROW_GROUP, CacheSchema, hidden_column, vectors_array
from craft_ray.anchors.storage import stored
from craft_ray.config import Experiment
from craft_ray.config.modes import stores
from craft_ray.errors import CacheRefused, ConfigError, DataError
from craft_ray.method.pooling import token_positions
from craft_ray.models.base import Model
from craft_ray.models.capabilities import TensorModel, tensor_model
from craft_ray.models.readings import Reading
from craft_ray.storage.files import checksum, clear_leftovers, new_folder
from craft_ray.storage.paths import StoragePath

ONE_VECTOR = ("vision_mean", "text_last", "masked_mean", "first_token", "last_token")
"""Positions with exactly one vector per sample: what a legacy tensor can hold."""


@dataclass(frozen=True)
class _Unread:
    """A placeholder for the rows until they are counted."""

    fingerprint: str
    features: None = None
    has_conversations: bool = False
    has_image_lists: bool = False
    has_responses: bool = False

    def __len__(self) -> int:
        return 0


def import_shards(
    shards: ShardFiles,
    folder: StoragePath,
    config: Experiment,
    model: Model,
    check: Callable[[StoragePath, Manifest], None],
    say: Callable[[str], None],
) -> Manifest:
    """Write the cache, check it, and move it to `folder`.

    Args:
        check: is called with the new cache before it is moved; raises CacheRefused if it is not the model's.
        say: receives what was converted, a line each.

    Raises:
        ConfigError: a position has more than one vector, or the model takes no tensors.
        CacheRefused: the shards do not fit the config, or the model does not take one of their rows.
    """
    reader = tensor_model(model)
    assert config.anchors is not None
    if stores(config.anchors.modes, "response"):
        raise ConfigError(
            "legacy shards hold no responses, and anchors.modes asks for them (replay): leave replay out, or build the "
            "cache with 'craft-ray anchors build'"
        )
    if stores(config.anchors.modes, "logits"):
        raise ConfigError(
            "legacy shards hold no logits, anchors.modes asks for them: set anchors.modes to [hidden], [token_ce] or "
            "both, or build the cache of logits with 'craft-ray anchors build'"
        )
    identity = identity_of(config, model, _Unread(shards.fingerprint)).model_copy(update={"inputs": "tensors"})
    ragged = [p for p in identity.positions if p not in ONE_VECTOR]
    if identity.schema.has_hidden and ragged:
        raise ConfigError(
            f"anchors.positions has {', '.join(ragged)}, legacy shards hold one vector per position: choose from "
            f"{', '.join(ONE_VECTOR)}"
        )
    if folder.exists():
        return _existing(folder, identity)
    clear_leftovers(folder.parent, of=folder.name)
    with new_folder(folder, last=MANIFEST) as temporary:
        first = load_rows(shards.files[0], identity)
        reading = choose_reading(first, identity, reader, str(shards.files[0]))
        for note in filter(None, (first.note, reading.words)):
            say(note)
        written, rows, shape = [], 0, None
        rounded = identity.dtype
        for number, file in enumerate(shards.files):
            legacy = load_rows(file, identity)
            _check_rows(file, legacy, reading, identity, reader)
            found = None if legacy.pixels is None else tuple(legacy.pixels.shape[1:])
            if shape not in (None, found):
                raise CacheRefused(f"{file}: its images are {found}, earlier ones are {shape}: import them separately")
            shape = found
            if legacy.vectors_BVF is not None:
                rounded = max(rounded, legacy.dtype, key=_coarseness)
            path = temporary / SHARDS / f"shard-{number:05d}.parquet"
            write_shard(path, identity.schema, _tables(legacy, reading, identity.schema))
            size = len(legacy.ids)
            rows += size
            written.append(Shard(name=path.name, rows=size, bytes=path.stat().st_size, blake3=checksum(path)))
        shards.check_rows(rows)
        rounded_to = None if rounded == identity.dtype else rounded
        identity = identity.model_copy(update={"rows": rows, "pixel_shape": shape, "rounded_to": rounded_to})
        manifest = manifest_of(temporary, identity, written)
        write_manifest(temporary, manifest)
        try:
            check(temporary, manifest)
        except CacheRefused as error:
            kept = reproduced_positions(first, reading, identity, reader)
            if not kept or kept == list(identity.positions):
                raise
            others = ", ".join(position for position in identity.positions if position not in kept)
            raise CacheRefused(
                f"{error.message}; {', '.join(kept)} is reproduced and {others} is not: import without it, with "
                f"anchors.positions=[{','.join(kept)}]"
            ) from None
    return manifest


def _check_rows(file: Path, legacy: LegacyRows, reading: Reading, identity: Identity, model: TensorModel) -> None:
    """Prepare every row of a shard as training will, so that none ends a run at the step that draws it."""
    for row, prompt in enumerate(legacy.prompts):
        pixels = None if legacy.pixels is None else legacy.pixels[row].numpy()
        suffix = None if legacy.suffixes is None else reading.suffix(legacy.suffixes[row])
        try:
            layout = model.from_tensors(reading.prompt(prompt), pixels, suffix).layout
            for position in identity.positions if identity.schema.has_hidden else ():
                token_positions(layout, position)
        except DataError as error:
            raise CacheRefused(f"{file}, row {row}: {error.message}; nothing was imported") from None


def _coarseness(dtype: str) -> int:
    return COARSENESS.index(dtype) if dtype in COARSENESS else 0


def _existing(folder: StoragePath, identity: Identity) -> Manifest:
    """The existing cache, if it is the one that would be written."""
    if not (folder / MANIFEST).exists():
        raise CacheRefused(
            f"{folder} exists and is not a complete cache: choose another craft.anchor_cache_dir, or delete it"
        )
    manifest = read_manifest(folder)
    found = manifest.identity
    expected = identity.model_copy(update={key: getattr(found, key) for key in ("rows", "pixel_shape", "rounded_to")})
    check_same(folder, found, expected, "import makes")
    return manifest


def _tables(legacy: LegacyRows, reading: Reading, schema: CacheSchema) -> Iterator[pa.Table]:
    for start in range(0, len(legacy.ids), ROW_GROUP):
        part = slice(start, start + ROW_GROUP)
        ids = legacy.ids[part]
        names = [f"anchor {id_}" for id_ in ids]
        pixels = [None] * len(ids) if legacy.pixels is None else [p.numpy().tobytes() for p in legacy.pixels[part]]
        columns: dict[str, pa.Array | list] = {
            "id": ids,
            "input_ids": [reading.prompt(prompt) for prompt in legacy.prompts[part]],
            "pixel_values": pixels,
        }
        if legacy.suffixes is not None:
            columns["suffix"] = [reading.suffix(tokens) for tokens in legacy.suffixes[part]]
        if legacy.vectors_BVF is not None:
            for column, position in enumerate(schema.positions):
                values = stored(legacy.vectors_BVF[part, column], names, [1] * len(ids), schema.dtype)
                one_each = np.split(values, len(ids))
                columns[hidden_column(position)] = vectors_array(one_each, schema.vector_size, schema.dtype)
        yield pa.table(columns, schema=schema.arrow())
