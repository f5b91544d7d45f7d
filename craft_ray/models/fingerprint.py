"""Identity of weights and of preprocessing, as hashes that do not depend on where files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import nn

from craft_ray.models.sharding import whole

LOCATION_KEYS = ("name_or_path", "_name_or_path", "processor_class", "tokenizer_file", "_commit_hash")
"""Settings that say where something came from, not what it does."""

WEIGHT_FILES = (".safetensors", ".bin")
SAMPLES, SAMPLE = 128, 16 << 10
"""How many parts of a file are read, and how many bytes of each."""


def weights_fingerprint(module: nn.Module) -> str:
    """Hash over names, types, shapes and bytes of the state; the same however the folder was sharded, and the module.
    All workers that share a module must ask for it."""
    digest = blake3(max_threads=blake3.AUTO)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data: Any = whole(tensor.detach()).contiguous().cpu().flatten().view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()[:32]


def files_fingerprint(folder: Path) -> str | None:
    """Hash over the names and sizes of a folder's weight files and over samples of their content: other weights differ
    nearly everywhere, and whoever does not load them need not read all of them. None if there are none."""
    files = sorted(file for file in folder.glob("*") if file.suffix in WEIGHT_FILES and file.is_file())
    digest = blake3()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for number in range(SAMPLES):
                content.seek(max(size - SAMPLE, 0) * number // (SAMPLES - 1))
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()[:32] if files else None


def json_fingerprint(value: Any) -> str:
    """Hash of a JSON-like value, its keys sorted."""
    return blake3(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_identity(tokenizer: Any) -> Any:
    """What a tokenizer does: its complete state if it is a fast one, otherwise vocabulary and special tokens.

    Padding and truncation are left out: each call sets them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer.get_vocab(), tokenizer.special_tokens_map]
    state = json.loads(backend.to_str())
    state.pop("padding"), state.pop("truncation")
    return [state, tokenizer.special_tokens_map]


def without_locations(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in LOCATION_KEYS}
