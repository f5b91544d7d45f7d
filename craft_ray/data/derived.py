"""Files in another layout, made from the user's: where rows are read at random, which the named file does not allow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from blake3 import blake3

from craft_ray.storage.files import new_file
from craft_ray.storage.node_cache import filled_once

LAYOUT = 1
"""Changes with what is written for the same content, so that an older file is not taken."""


def derived(content: str, how: Sequence[Any], write: Callable[[Path], None]) -> Path:
    """The file that `write` writes, below the cache of Hugging Face datasets: once, for all processes and runs.

    Args:
        content: checksum of the user's file. Its path and time say too little: it may soon be rewritten.
        how: what else decides what is written.
    """
    root = Path(os.path.expanduser(datasets.config.HF_DATASETS_CACHE)) / "craft-ray"
    root.mkdir(parents=True, exist_ok=True)
    name = blake3(json.dumps([LAYOUT, content, *how]).encode()).hexdigest()[:32]
    with filled_once(name, root) as (target, ours):
        if ours:
            with new_file(target) as temporary:
                write(temporary)
    return target
