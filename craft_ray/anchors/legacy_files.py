"""The files of an earlier cache: which there are, in which order, and whether they are all there."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from craft_ray.errors import CacheRefused, ConfigError, first_line

SHARD = re.compile(r"shard[_-](.+)\.pth?")
OPENVLA_SHARD = re.compile(r"hidden_anchor_shard_\d+\.pt")
"""A shard of the CRaFT scripts for OpenVLA: a list of records, each with inputs and vectors of its own."""
METADATA = "metadata.json"
ROWS = ("num_anchors", "num_samples")
"""Keys of metadata.json that say how many anchors there are, one for each earlier builder."""


class ShardFiles:
    """The shards of a folder, in the order of their numbers: `shard_10.pt` comes after `shard_9.pt`.

    Raises:
        ConfigError: the folder holds no shard.
        CacheRefused: two files are the same shard, metadata.json names another number of shards, or the shards are
            those of the OpenVLA scripts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = list(folder.iterdir()) if folder.is_dir() else []
        self.files = sorted((file for file in found if SHARD.fullmatch(file.name)), key=_natural)
        if not self.files:
            if any(OPENVLA_SHARD.fullmatch(file.name) for file in found):
                raise _of_openvla(folder)
            raise ConfigError(
                f"there are no legacy shards in {folder}: specify a folder that holds shard_*.pt (or shard-*.pt, *.pth)"
            )
        name, count = Counter(file.stem for file in self.files).most_common(1)[0]
        if count > 1:
            raise CacheRefused(f"{folder} holds {name}.pt and {name}.pth: keep one of them")
        self._metadata = self._read_metadata()
        self._check(self._metadata.get("num_shards"), len(self.files), "shards")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all content; no path is part of it."""
        digest = blake3(max_threads=blake3.AUTO)
        for file in self.files:
            digest.update(file.name.encode())
            digest.update_mmap(file)
        return digest.hexdigest()[:32]

    def check_rows(self, rows: int) -> None:
        """Compare the number of anchors that were read with that of metadata.json.

        Raises:
            CacheRefused: it is another number.
        """
        for key in ROWS:
            self._check(self._metadata.get(key), rows, "anchors")

    def _check(self, stated: Any, found: int, what: str) -> None:
        if stated is not None and stated != found:
            raise CacheRefused(
                f"{self.folder} holds {found} {what}, its {METADATA} says {stated}: fetch the missing shards, or "
                f"correct {METADATA} if there are no others"
            )

    def _read_metadata(self) -> dict[str, Any]:
        path = self.folder / METADATA
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise CacheRefused(f"{path} is not a JSON object: fetch it again, or delete it if every shard is there")
        return content


def read_shard(file: Path) -> dict[str, Any]:
    """The content of a shard, read without running code that a pickle could contain.

    Raises:
        CacheRefused: the file is damaged, contains code, does not hold a dict, or is a shard of the OpenVLA scripts.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CacheRefused(
            f"{file} is damaged or holds more than tensors, numbers and text: a pickle that runs code is not loaded; "
            f"save it again as a dict of tensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CacheRefused(f"{file} is damaged ({first_line(error)[:120]}): fetch or write it again") from None
    if not isinstance(content, dict):
        raise CacheRefused(f"{file} holds a {type(content).__name__}, a legacy shard is a dict of tensors")
    if isinstance(content.get("records"), list):
        raise _of_openvla(file)
    return content


def _of_openvla(path: Path) -> CacheRefused:
    return CacheRefused(
        f"{path} holds records of the earlier scripts for OpenVLA, and only caches of those for LeRobot are imported: "
        f"build one with craft-ray anchors build"
    )


def _natural(file: Path) -> list[tuple[int, str]]:
    """A key that orders the numbers in a name by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name) if part]
