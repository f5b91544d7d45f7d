"""What only makes a model faster or smaller changes no number but by rounding, and is refused where it cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from craft_ray.config import ModelConfig
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError
from craft_ray.models import load_model
from craft_ray.models.base import Batch, Model, evaluating
from craft_ray.models.loading import check_spread
from tests.support.tokenizers import CHATML, byte_level_chat, chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("speed"), byte_level_chat(CHATML))


def loaded(folder: Path, **settings: Any) -> Model:
    return load_model(ModelConfig(path=str(folder), **settings), "fp32")


def batch(model: Model) -> Batch:
    samples = [Sample(str(n), "a prompt" * n, None, "an answer" * n) for n in (1, 3)]
    return model.collate([model.preprocess_task(sample) for sample in samples])


def gradients(model: Model) -> list[torch.Tensor]:
    model.task_loss(batch(model)).backward()
    return [p.grad for p in model.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_one_that_is_asked_for(folder: Path, attention: str) -> None:
    plain, chosen = loaded(folder), loaded(folder, attention=attention)
    assert chosen.module.config._attn_implementation == attention
    assert chosen.weights_fingerprint() == plain.weights_fingerprint()
    assert chosen.preprocessor_fingerprint() == plain.preprocessor_fingerprint()
    for mine, theirs in zip(gradients(chosen), gradients(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("flash_attention_2", "model.attention is flash_attention_2: "),
        ("flex_attention", "model.attention is flex_attention, which trains on a GPU alone: set model.attention=sdpa"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine that has what is missing here")
def test_what_the_machine_lacks_is_one_line(folder: Path, attention: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, attention=attention)
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


def test_without_a_compiler_compiling_is_refused(folder: Path) -> None:
    without = inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ConfigError, match=r"model\.compile is true, and torch\.compile finds no compiler"):
        loaded(folder, compile=True)


@pytest.mark.slow
def test_compiled_layers_train_as_before_and_evaluate_uncompiled(folder: Path, tmp_path: Path) -> None:
    plain, compiled = loaded(folder), loaded(folder, compile=True)
    layers = compiled.module.model.layers
    assert all(layer._compiled_call_impl is not None for layer in layers)
    for mine, theirs in zip(gradients(compiled), gradients(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    with evaluating(compiled.module):
        assert all(layer._compiled_call_impl is None for layer in layers)
        found = compiled.module(input_ids=torch.arange(9)[None]).logits
    assert all(layer._compiled_call_impl is not None for layer in layers)
    with evaluating(plain.module):
        assert torch.equal(found, plain.module(input_ids=torch.arange(9)[None]).logits)
    assert list(compiled.module.state_dict()) == list(plain.module.state_dict())
    assert compiled.weights_fingerprint() == plain.weights_fingerprint()
    compiled.save(tmp_path / "saved")
    assert loaded(tmp_path / "saved").weights_fingerprint() == plain.weights_fingerprint()


def test_a_spread_model_must_be_on_gpus_alone() -> None:
    check_spread({"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}, 2, "m")
    for found in ({"model.layers.0": 0, "model.layers.1": "cpu"}, {"model.layers.0": 1, "lm_head": "disk"}):
        name = list(found)[1]
        with pytest.raises(ConfigError, match=f"1 of its parts do not fit \\(e.g. {name}\\): raise the number of GPUs"):
            check_spread(found, 2, "m")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_spread_teacher_computes_the_same(folder: Path) -> None:
    alone = load_model(ModelConfig(path=str(folder)), "fp32", "cuda")
    spread = load_model(ModelConfig(path=str(folder)), "fp32", "cuda", gpus=2)
    with torch.no_grad(), evaluating(alone.module), evaluating(spread.module):
        mine, theirs = (model.hidden_states(batch(model).to(alone.device), [1, 2]) for model in (spread, alone))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
