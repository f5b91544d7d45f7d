"""Caches as the earlier builders wrote them, made here with LeRobot's own pi0_fast, import for that policy.

The builders took the first camera's picture, scaled to [-1, 1], and the prompt's text, padded to the policy's
`tokenizer_max_length`; BOS followed the padding in the teacher's pass and was not stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

pytest.importorskip("lerobot")

from craft_pipelines.anchors import import_legacy
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy

from craft_ray.config import Experiment, parse_config
from craft_ray.errors import CacheRefused
from craft_ray.lerobot.size import sized
from craft_ray.models import load_model
from craft_ray.retention.constraints import open_mode
from tests.support.robots import TASKS, small_policy

ROWS = 6
Shard = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("policies")
    return {name: small_policy(root / name, cameras=count) for name, count in (("one", 1), ("two", 2))}


def earlier_inputs(policy: Any, seed: int = 0) -> Shard:
    """Pictures, and the tokens of prompts of two lengths."""
    random = torch.Generator().manual_seed(seed)
    texts = [TASKS[row % 2] + " again" * (row % 3) for row in range(ROWS)]
    most = policy.config.tokenizer_max_length
    rows = [policy._paligemma_tokenizer(text, add_special_tokens=False)["input_ids"][:most] for text in texts]
    ids, mask = torch.zeros(ROWS, most, dtype=torch.long), torch.zeros(ROWS, most, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    pixels = torch.rand(ROWS, 3, 32, 32, generator=random) * 2 - 1
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "prompts": texts}


@torch.no_grad()
def earlier_states(policy: Any, inputs: Shard, with_bos: bool) -> tuple[tuple[Tensor, ...], Tensor, int]:
    """Hidden states [B, S, D] of the prefix, which of its text tokens are real, and how many image tokens it has."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if with_bos:
        bos = torch.full((ROWS, 1), policy._paligemma_tokenizer.bos_token_id)
        ids, mask = torch.cat([ids, bos], 1), torch.cat([mask, torch.ones_like(bos).bool()], 1)
    seen = [torch.ones(ROWS, dtype=torch.bool)]
    embedded, real, attention, pictures, _ = policy.model.embed_prefix_fast(
        [inputs["pixel_values"]], seen, ids, mask, None, None
    )
    states = policy.model.paligemma_with_expert.paligemma.model.language_model(
        inputs_embeds=embedded,
        attention_mask=prepare_attention_masks_4d(attention, dtype=embedded.dtype),
        position_ids=torch.cumsum(real, 1) - 1,
        output_hidden_states=True,
    ).hidden_states
    return states, mask, pictures


@pytest.fixture(params=["one", "two"])
def policy(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Path, Any]:
    folder = folders[request.param]
    with sized(folder):
        return folder, PI0FastPolicy.from_pretrained(folder).eval()


def experiment(policy: Path, folder: Path, **anchors: Any) -> Experiment:
    tree = {
        "model": {"kind": "lerobot", "path": str(policy)},
        "task": {"format": "lerobot", "path": str(folder / "unused")},
        "anchors": {"source": {"format": "lerobot", "path": str(folder / "unused")}, **anchors},
        "craft": {"anchor_cache_dir": str(folder / "anchors"), "anchor_batch_size": 4},
        "train": {"steps": 2, "batch_size": 4},
        "workers": {"num_workers": 0},
    }
    return parse_config(tree, "test")


def imported(config: Experiment, folder: Path, shard: Shard) -> tuple[list[str], Any]:
    """What the import said, and the cache's table."""
    lines: list[str] = []
    (folder / "legacy").mkdir(exist_ok=True)
    torch.save(shard, folder / "legacy" / "shard_0000.pt")
    import_legacy(folder / "legacy", config, check=True, say=lines.append)
    return lines, pq.read_table(next((folder / "anchors" / "shards").glob("*.parquet")))


def check_untouched(config: Experiment, mode: str) -> None:
    """The student of a run on this cache, in its own batches, reproduces it."""
    changes = {"craft.retention_mode": mode, "craft.epsilon_start": 1.0}
    model = load_model(config.model, "fp32")
    open_mode(config.changed(changes), model, model.weights_fingerprint()).check_untouched(range(ROWS), 4)


@pytest.mark.parametrize("with_bos", [True, False])
def test_pooled_features_of_pictures_import(with_bos: bool, policy: tuple[Path, Any], tmp_path: Path) -> None:
    """The numbers are kept within float16, and it is found out whether BOS was in the pass."""
    folder, lerobots = policy
    inputs = earlier_inputs(lerobots)
    states, _, pictures = earlier_states(lerobots, inputs, with_bos)
    features = states[-2][:, :pictures].mean(1)
    meta = {"hidden_layer": -2, "pooling": "mean_image_tokens", "dtype": "float16"}
    config = experiment(folder, tmp_path, positions=["vision_mean"], layers=[-2], modes=["hidden"])
    lines, table = imported(config, tmp_path, {**inputs, "target_features": features.half(), "meta": meta})
    assert ("BOS put back at the end of the prompt" in lines) == with_bos
    assert [line for line in lines if f"reproduces {ROWS} anchors" in line]
    vectors = np.array(table["hidden_vision_mean"].to_pylist(), dtype=np.float16)
    np.testing.assert_array_equal(vectors[:, 0], features.half().numpy())
    check_untouched(config, "hidden")


def test_a_text_vector_that_was_taken_at_the_padding_is_named(policy: tuple[Path, Any], tmp_path: Path) -> None:
    """The index of the earlier builder's last text token did not count the padding before BOS."""
    folder, lerobots = policy
    inputs = earlier_inputs(lerobots)
    states, mask, pictures = earlier_states(lerobots, inputs, with_bos=True)
    last = torch.tensor([int(row.nonzero()[-1]) for row in mask])

    def shard(index: Tensor) -> Shard:
        pairs = [(s[:, :pictures].mean(1), s[:, pictures:][torch.arange(ROWS), index]) for s in states[-2:]]
        vectors = torch.stack([torch.stack(pair, 1) for pair in pairs], 1)
        meta = {"layers_to_save": [0, 1], "pooling_strategy": {"vision": "mean", "text": "last"}}
        return {**inputs, "teacher_hidden": vectors, "meta": meta}

    both = experiment(folder, tmp_path, positions=["vision_mean", "text_last"], modes=["hidden"])
    with pytest.raises(CacheRefused, match=r"vision_mean is reproduced and text_last is not: .*\[vision_mean\]"):
        imported(both, tmp_path, shard(mask.sum(1) - 1))
    lines, _ = imported(both.changed({"anchors.positions": ["vision_mean"]}), tmp_path, shard(mask.sum(1) - 1))
    assert "layers_to_save [0, 1] are blocks, counted from 0: hidden states [1, 2] here" in lines
    (tmp_path / "right").mkdir()
    right = both.changed({"craft.anchor_cache_dir": str(tmp_path / "right" / "anchors")})
    imported(right, tmp_path / "right", shard(last))
    check_untouched(right, "hidden")


def test_generated_tokens_import(policy: tuple[Path, Any], tmp_path: Path) -> None:
    """Prompt, padding and the greedy tokens in one row; labels end with the end of sequence, the mask does not."""
    folder, lerobots = policy
    inputs = earlier_inputs(lerobots)
    steps = 6
    with torch.no_grad():
        tokens = lerobots.model.sample_actions_fast(
            [inputs["pixel_values"]], [torch.ones(ROWS, dtype=torch.bool)], inputs["input_ids"],
            inputs["attention_mask"].bool(), max_decoding_steps=steps,
        )  # fmt: skip
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), tokens], 1)
    labels[1::2, -2:] = -100  # as behind an end of sequence
    shard = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1),
        "labels": labels,
    }
    config = experiment(folder, tmp_path, modes=["token_ce"], max_new_tokens=steps)
    lines, table = imported(config, tmp_path, shard)
    assert "BOS put back at the end of the prompt" in lines
    expected = [row[: steps - 2 * (i % 2)] for i, row in enumerate(tokens.tolist())]
    end = lerobots._paligemma_tokenizer.convert_tokens_to_ids("|")
    expected = [row[: row.index(end) + 1] if end in row else row for row in expected]
    assert table["suffix"].to_pylist() == expected
    count = sum(map(len, expected))
    assert [line for line in lines if f"{count} of {count} suffix tokens equal" in line]
    check_untouched(config, "token_ce")


def test_pictures_of_another_size_are_one_line(policy: tuple[Path, Any], tmp_path: Path) -> None:
    folder, lerobots = policy
    inputs = earlier_inputs(lerobots)
    wrong = {**inputs, "pixel_values": torch.zeros(ROWS, 3, 16, 16), "target_features": torch.zeros(ROWS, 32)}
    config = experiment(folder, tmp_path, positions=["vision_mean"], layers=[-2], modes=["hidden"])
    with pytest.raises(CacheRefused, match=r"pixel_values are \[3, 16, 16\], but the policy takes .*\[3, 32, 32\]"):
        imported(config, tmp_path, wrong)
