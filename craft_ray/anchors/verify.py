"""Checks the files of a cache against its manifest. `craft_ray/retention/reforward.py` checks its content."""

from __future__ import annotations

import pyarrow.parquet as pq

from craft_ray.anchors.manifest import SHARDS, Manifest
from craft_ray.anchors.reader import check_shards
from craft_ray.errors import CacheRefused
from craft_ray.storage.paths import StoragePath, readable


def check_files(folder: StoragePath, manifest: Manifest) -> None:
    """Check sizes, checksums, the number of rows, and that every id occurs once.

    Raises:
        CacheRefused: naming the shard or the id.
    """
    check_shards(folder, manifest)
    seen: dict[str, str] = {}
    renewal = manifest.identity.renewal
    for shard in manifest.shards:
        ids = pq.read_table(readable(folder / SHARDS / shard.name), columns=["id"])["id"].to_pylist()
        if len(ids) != shard.rows:
            raise CacheRefused(
                f"{folder / SHARDS / shard.name} has {len(ids)} rows, the manifest says {shard.rows}: {renewal}"
            )
        for anchor in ids:
            if anchor in seen:
                raise CacheRefused(
                    f"anchor {anchor} is in {seen[anchor]} and again in {shard.name} of {folder}: {renewal}"
                )
            seen[anchor] = shard.name
    if len(seen) != manifest.identity.rows:
        raise CacheRefused(
            f"the shards of {folder} have {len(seen)} anchors, the manifest says {manifest.identity.rows}: {renewal}"
        )
