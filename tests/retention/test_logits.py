"""Retention mode `logits` on real caches: it stores what each anchor alone yields, and its loss is the formula."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from craft_pipelines.anchors import build, import_legacy, preview, verify
from torch import Tensor
from torch.nn.functional import kl_div

from craft_ray.anchors.build import estimate
from craft_ray.anchors.manifest import Identity, read_manifest
from craft_ray.anchors.reader import open_anchors
from craft_ray.anchors.show import describe
from craft_ray.config import CompareConfig, CraftConfig, Experiment
from craft_ray.data.source import open_source
from craft_ray.errors import CacheRefused, ConfigError
from craft_ray.method.pooling import token_positions
from craft_ray.models.base import Model
from craft_ray.retention.constraints import open_mode
from craft_ray.retention.logits import Logits
from craft_ray.retention.token_ce import TokenCE
from craft_ray.run.folder import RunFolder
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import Run, train
from craft_ray.workers import OneWorker
from tests.support.caches import built, cache_folder, json_lines, prompts, table, teacher, text_experiment
from tests.support.experiments import Digits

LENGTHS = [3, 9, 1, 14, 6, 2, 11, 5]
ROWS = range(len(LENGTHS))
POSITIONS = ["all", "suffix"]


def experiment(model: Path, folder: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    settings = {
        "anchors.modes": ["logits"],
        "anchors.logits": {"k": 8, "positions": POSITIONS},
        "anchors.batch_size": 3,
        "craft.retention_mode": "logits",
        "craft.epsilon_start": 0.05,
    }
    return text_experiment(model, prompts(folder / "a.jsonl", LENGTHS), folder, settings | dict(changes or {}))


def mode_of(config: Experiment, model: Model) -> Logits:
    mode = open_mode(config, model, model.weights_fingerprint())
    assert isinstance(mode, Logits)
    return mode


@torch.no_grad()
def alone(model: Model, mode: Logits, row: int) -> Tensor:
    """The logits [n, V] of one unpadded anchor at all positions, one after the other."""
    features = model.preprocess(mode.anchors.sample(row), mode.anchors.suffix(row))  # type: ignore[call-arg]
    logits_SV = model.module(features.tokens["input_ids"][None]).logits[0]
    return logits_SV[[token for p in POSITIONS for token in token_positions(features.layout, p)]]


def move(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.1)


@pytest.mark.parametrize("pack_tokens", [0, 64])
def test_with_the_whole_vocabulary_the_loss_is_the_kl_divergence_of_each_anchor_alone(
    pack_tokens: int, text_model: Path, tmp_path: Path
) -> None:
    settings = {"anchors.pack_tokens": pack_tokens, "anchors.dtype": "float32"}
    first = experiment(text_model, tmp_path, settings)
    model = teacher(first)
    vocabulary = model.module.config.vocab_size
    config = first.changed({"anchors.logits.k": vocabulary, "anchors.logits.temperature": 1.5})
    built(config)
    mode = mode_of(config, model)
    before = [(alone(model, mode, row) / 1.5).log_softmax(1) for row in ROWS]
    mode.check_untouched(ROWS, 3)
    move(model)
    after = [(alone(model, mode, row) / 1.5).log_softmax(1) for row in ROWS]
    expected = kl_div(torch.cat(after), torch.cat(before), reduction="batchmean", log_target=True)
    batch = mode.batch(ROWS)
    assert batch.count == sum(map(len, before))
    assert batch.teacher_NC.shape[1] == vocabulary  # nothing is left for a class of its own
    assert mode.loss(batch).item() == pytest.approx(expected.item(), rel=1e-4)
    assert mode.mean_divergence(ROWS, 3) == pytest.approx(expected.item(), rel=1e-4)


def test_padded_and_packed_builds_store_the_same_distributions(text_model: Path, tmp_path: Path) -> None:
    kept = []
    for pack_tokens in (0, 64, 1):
        changes = {"anchors.pack_tokens": pack_tokens, "anchors.dtype": "float32"}
        config = experiment(text_model, tmp_path, changes).changed(
            {"craft.anchor_cache_dir": str(tmp_path / f"anchors-{pack_tokens}")}
        )
        built(config)
        batch = mode_of(config, teacher(config)).batch(ROWS)
        kept.append((batch.tokens_NK, batch.teacher_NC))
    for tokens, log_probs in kept[1:]:
        torch.testing.assert_close(log_probs, kept[0][1], atol=1e-5, rtol=1e-5)
        assert (tokens == kept[0][0]).float().mean() > 0.99  # near ties may change places


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_untouched_student_is_within_rounding_and_has_no_gradient(
    dtype: str, precision: str, text_model: Path, tmp_path: Path
) -> None:
    config = experiment(text_model, tmp_path, {"anchors.dtype": dtype, "train.precision": precision})
    built(config)
    model = teacher(config)
    mode = mode_of(config, model)

    def norm() -> float:
        model.module.zero_grad()
        mode.loss(mode.batch(ROWS)).backward()
        return sum(p.grad.square().sum().item() for p in model.module.parameters() if p.grad is not None) ** 0.5

    mode.check_untouched(ROWS, 4)
    untouched = norm()
    if precision == "fp32":
        assert 0 <= mode.loss(mode.batch(ROWS)).item() <= mode.noise_floor(ROWS)
    move(model)
    moved = norm()
    assert untouched < {"fp32": 0.01, "bf16": 0.1}[precision] * moved
    assert mode.loss(mode.batch(ROWS)).item() > 100 * mode.noise_floor(ROWS)
    with pytest.raises(CacheRefused, match=r"the untouched student is .* nats a token away from the cached teacher"):
        mode.check_untouched(ROWS, 4)


def test_a_vision_language_model_is_held_at_its_answer(digits: Digits, tmp_path: Path) -> None:
    config = digits.experiment(
        tmp_path,
        {
            "anchors.modes": ["hidden", "logits"],
            "anchors.source.limit": 12,
            "anchors.logits.k": 4,
            "craft.retention_mode": "logits",
            "craft.epsilon_start": 0.05,
        },
    )
    built(config)
    model = teacher(config)
    mode = mode_of(config, model)
    assert mode.positions == ("suffix",)  # the model's own default
    mode.check_untouched(range(12), 5)
    move(model)
    assert mode.mean_divergence(range(12), 5) > 1e-3


def test_a_run_is_held_to_it_and_resumes(text_model: Path, tmp_path: Path) -> None:
    changes = {"train.steps": 4, "train.checkpoint_every": 2, "craft.anchor_holdout": 0.3, "craft.anchor_batch_size": 2}
    config = experiment(text_model, tmp_path, changes)
    built(config)
    finals = {}
    for name in ("whole", "resumed"):
        place = RunFolder(tmp_path / name)
        place.begin(config, ["test"])
        if name == "resumed":
            part = Run(config, place, OneWorker(), NullObserver())
            part.loop(until=2)
            part.close()
        train(config, place, OneWorker(), NullObserver())
        result = place.finished()
        assert result is not None
        finals[name] = (result["retention_loss"], result["lambda"])
        assert result["retention_mode"] == "logits"
        assert result["epsilon"] == 0.05
    assert finals["whole"] == finals["resumed"]


def test_a_variant_of_a_comparison_has_its_own_budget() -> None:
    base = CraftConfig(epsilon_start=0.3)
    own = CompareConfig(variants={"lwf": {"retention_mode": "logits"}}).craft_settings("lwf", base)
    variant = CraftConfig.model_validate({**base.model_dump(), **own})
    assert (variant.epsilon_start, variant.epsilon_unit) == (0.05, "kl_nats")


# -- sizes and words


def test_the_build_says_the_bytes_of_a_token_before_anything_is_written(text_model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    config = experiment(text_model, tmp_path, {"anchors.modes": ["hidden", "logits"]})
    preview(config, say=lines.append)
    assert not cache_folder(config).exists()
    build(config, say=lines.append)
    said = "8 most likely of 98 next tokens and the mass of the others, at all, suffix ("
    vocabulary = teacher(config).module.config.vocab_size
    said = said.replace("98", str(vocabulary))
    announced = [line for line in lines if "most likely" in line]
    assert len(announced) == 2  # by the preview and by the build
    for line in announced:
        assert said in line
        assert "tokens an anchor, 34 bytes a token)" in line  # 8 ids of 2 bytes, 9 log-probabilities of 2 bytes
    shown = "\n".join(describe(cache_folder(config)))
    assert f"{said}34 bytes a token)" in shown
    identity = read_manifest(cache_folder(config)).identity
    assert config.anchors is not None
    source = open_source(config.anchors.source, "anchors.source")
    expected = estimate(teacher(config), source, identity.schema, config.anchors)
    rows = table(cache_folder(config)).to_pylist()
    assert expected.tokens_per_row == sum(len(row["tokens_all"]) + 3 for row in rows) / len(rows)
    verify(cache_folder(config), config, 4, say=lines.append)
    assert "divergence of the logits" in lines[-1]


def test_a_cache_without_logits_keeps_its_fingerprint() -> None:
    """Known answer: the fingerprint of this identity before logits existed."""
    identity = Identity(
        teacher="t",
        kind="causal_lm",
        preprocessor="p",
        precision="fp32",
        modes=("hidden", "token_ce"),
        layers=(1, 2),
        num_hidden_states=3,
        positions=("all",),
        hidden_size=8,
        dtype="float16",
        inputs="raw",
        suffix_from="teacher",
        max_new_tokens=4,
        source="s",
        rows=2,
    )
    assert identity.fingerprint == "ff4d60ecbb5a45bcaedd2e79f0061270"
    assert "logits" not in json.loads(identity.model_dump_json())


# -- refusals


def test_what_does_not_fit_is_refused_in_one_line(text_model: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], changes: dict[str, Any], *parts: str) -> None:
        changed = config.changed(changes)
        with pytest.raises(error) as caught:
            mode_of(changed, model) if error is CacheRefused else built(changed)
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value)

    config = experiment(text_model, tmp_path)
    model = teacher(config)
    built(config)
    refused(CacheRefused, {"anchors.logits.k": 9}, "logits of k 8", "anchors.logits.k is 9")
    refused(CacheRefused, {"anchors.logits.temperature": 2.0}, "logits of temperature 1.0")
    refused(CacheRefused, {"anchors.logits.positions": ["all"]}, "positions all, suffix", "positions is all")
    hidden = {"craft.retention_mode": "hidden", "craft.epsilon_start": 0.05}
    refused(CacheRefused, hidden, "holds mode logits", "asks for hidden")
    refused(ConfigError, {"anchors.logits.k": 10**6}, "anchors.logits.k is 1000000", "vocabulary")
    refused(ConfigError, {"anchors.logits.positions": ["masked_mean"]}, "masked_mean", "choose e.g. suffix or all")
    with pytest.raises(ConfigError, match="legacy shards hold no logits"):
        import_legacy(legacy(tmp_path / "legacy"), config, check=False)
    mode_of(config.changed({"anchors.modes": ["hidden"], "anchors.logits.k": 3}), model)  # the cache decides


def legacy(folder: Path) -> Path:
    folder.mkdir()
    ids = torch.ones(1, 3, dtype=torch.long)
    torch.save({"input_ids": ids, "attention_mask": ids}, folder / "shard_0.pt")
    return folder


# -- replay


def test_token_ce_on_the_responses_is_replay(text_model: Path, tmp_path: Path) -> None:
    """The loss on labelled anchors is the task's own loss on them: L_task + lambda L_ret is joint training."""
    rows = [{"id": f"a{i}", "prompt": "the fox", "response": "jumps over" * (1 + i)} for i in range(4)]
    source = json_lines(tmp_path / "labelled.jsonl", rows)
    columns = {"id": "id", "prompt": "prompt", "response": "response"}
    config = text_experiment(
        text_model,
        source,
        tmp_path,
        {
            "anchors.source.columns": columns,
            "task.columns": columns,
            "anchors.modes": ["token_ce"],
            "anchors.suffix_from": "response",
        },
    )
    built(config)
    model = teacher(config)
    mode = TokenCE(model, open_anchors(cache_folder(config)))
    samples = open_source(config.task, "task")
    batch = model.collate([model.preprocess_task(samples[i]) for i in range(4)])
    assert mode.loss(mode.batch(range(4))).item() == model.task_loss(batch).item()
