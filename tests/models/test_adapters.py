"""Adapters: what trains, what is saved, what merging gives, and which mistakes are refused in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from craft_ray.config import AdapterConfig, ModelConfig
from craft_ray.errors import ConfigError
from craft_ray.method.gradients import GradientPair
from craft_ray.models import adapting, load_model
from craft_ray.models.adapter import BASE, CONFIG
from craft_ray.models.base import Model
from tests.support.hubs import fetched

IDS = torch.arange(24).view(2, 12) % 97 + 3


def adapted(
    path: Path, dtype: str = "float32", moved: float = 0.1, gradient_checkpointing: bool = False, **settings: Any
) -> Model:
    """The model with an adapter that training has moved."""
    config = ModelConfig(path=str(path), dtype=dtype, gradient_checkpointing=gradient_checkpointing)  # type: ignore[arg-type]
    model = load_model(config, "fp32")
    torch.manual_seed(0)
    adapting.attach(model, AdapterConfig(**{"r": 4, **settings}), config, model.weights_fingerprint())
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn_like(parameter) * parameter.std().clamp(min=0.1)
    return model


def logits(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        return module(input_ids=IDS, use_cache=False).logits.float()


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    assert error.value.exit_code == 2
    assert "\n" not in error.value.message
    return error.value.message


def test_only_the_adapter_trains_and_without_it_the_student_is_the_teacher(text_model: Path) -> None:
    base = load_model(ModelConfig(path=str(text_model)), "fp32")
    untouched = adapted(text_model, moved=0.0)
    assert torch.equal(logits(untouched.module), logits(base.module)), "the untouched student is the teacher"
    model = adapted(text_model)
    assert not torch.equal(logits(model.module), logits(base.module))
    trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert model.adapter is not None
    assert model.adapter.base == base.weights_fingerprint()
    model.adapter.tuner.disable_adapter_layers()
    assert torch.equal(logits(model.module), logits(base.module))


def test_a_bfloat16_base_has_a_float32_adapter(text_model: Path, tmp_path: Path) -> None:
    model = adapted(text_model, "bfloat16")
    assert {p.dtype for p in model.module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.module.parameters() if not p.requires_grad} == {torch.bfloat16}
    model.save(tmp_path / "saved")
    again = load_model(ModelConfig(path=str(text_model), dtype="bfloat16"), "fp32", weights=str(tmp_path / "saved"))
    assert torch.equal(logits(again.module), logits(model.module))


def test_checkpointing_of_activations_does_not_change_the_gradients(text_model: Path) -> None:
    plain, saving = adapted(text_model), adapted(text_model, gradient_checkpointing=True)
    for model in (plain, saving):
        model.module(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for one, two in zip(plain.module.parameters(), saving.module.parameters(), strict=True):
        assert (one.grad is None) == (not one.requires_grad)
        assert one.grad is None or torch.allclose(one.grad, two.grad, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True, "alpha": 2, "init": "gaussian"},
     {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, {"target_modules": r".*layers\.1\..*(up|down)_proj"}],
)  # fmt: skip
def test_a_saved_adapter_loads_everywhere_and_merges(settings: dict, text_model: Path, tmp_path: Path) -> None:
    model = adapted(text_model, **settings)
    expected = logits(model.module)
    model.save(tmp_path / "saved")

    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(text_model), tmp_path / "saved")
    assert torch.equal(logits(by_peft), expected)
    if not settings.get("use_dora"):  # transformers 5.23 leaves out the magnitudes of any DoRA adapter
        by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits(by_transformers), expected)
    ours = load_model(ModelConfig(path=str(text_model)), "fp32", weights=str(tmp_path / "saved"))
    assert torch.equal(logits(ours.module), expected)
    assert [n for n, p in ours.module.named_parameters() if p.requires_grad] == [
        n for n, p in model.module.named_parameters() if p.requires_grad
    ]

    adapting.merge(model)
    assert torch.allclose(logits(model.module), expected, atol=1e-5 * float(expected.abs().max()))
    model.save(tmp_path / "merged")
    plain = load_model(ModelConfig(path=str(tmp_path / "merged")), "fp32")
    assert torch.equal(logits(plain.module), logits(model.module))
    teacher = load_model(ModelConfig(path=str(tmp_path / "saved")), "fp32")
    assert teacher.weights_fingerprint() == plain.weights_fingerprint(), "as model.path the adapter is merged"
    assert all(parameter.requires_grad for parameter in teacher.module.parameters())


def test_an_adapter_that_peft_itself_saved_is_a_teacher(text_model: Path, tmp_path: Path) -> None:
    """Its folder has no tokenizer; the base's is used."""
    module = get_peft_model(
        AutoModelForCausalLM.from_pretrained(text_model), LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    )
    module.save_pretrained(tmp_path / "theirs")
    teacher = load_model(ModelConfig(path=str(tmp_path / "theirs")), "fp32")
    assert torch.allclose(logits(teacher.module), logits(module), atol=1e-4)
    assert teacher.adapter is None
    teacher.save(tmp_path / "whole", final=tmp_path / "whole")  # as a checkpoint of a run that trained all of it
    again = load_model(ModelConfig(path=str(tmp_path / "theirs")), "fp32", weights=str(tmp_path / "whole"))
    assert again.weights_fingerprint() == teacher.weights_fingerprint()


@pytest.mark.parametrize("tokenizer", [True, False])
def test_an_adapter_on_the_hub_is_refused_in_one_line(
    tokenizer: bool, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in PEFT's form, which has no processor; and if the model that it belongs to does not load."""
    adapted(text_model).save(tmp_path / "saved")
    for file in () if tokenizer else (tmp_path / "saved").glob("*token*"):
        file.unlink()
    name = fetched("somebody/adapter", tmp_path / "saved", tmp_path / "hub", monkeypatch)
    for _ in range(2):
        with pytest.raises(ConfigError) as error:
            load_model(ModelConfig(path=name), "fp32")
        assert "model.path somebody/adapter is an adapter on the hub: download it" in one_line(error)
        changed = tmp_path / "hub" / "models--somebody--adapter" / "snapshots" / ("0" * 40) / CONFIG
        changed.write_text(changed.read_text().replace(str(text_model), "somebody/nothing"))


def test_the_state_of_an_adapter_is_two_hundredths_of_full_training() -> None:
    """Gradients and moments at SmolLM2-135M's shape, counted."""
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        module = LlamaForCausalLM(shape)

    def state() -> int:
        pair = GradientPair(module.named_parameters())
        moments = 2 * sum(p.numel() * p.element_size() for p in pair.parameters)
        return sum(buffer.numel() * buffer.element_size() for buffer in pair.buffers) + moments

    full = state()
    model = cast(Model, SimpleNamespace(module=module, adapter=None, merged_adapter=None))
    adapting.attach(model, AdapterConfig(r=8), ModelConfig(path="smollm2"), "-")
    assert 0.01 < state() / full <= 0.02


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_porj"]}, "adapter.target_modules: no module of the model is named 'q_porj'.*q_proj"),
        ({"target_modules": ["q_proj", "value"]}, "named 'value'.*nearest are .*_proj"),
        ({"target_modules": "q_proj"}, r"matches no whole name.*\[.*q_proj"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": ["self_attn"]}, "PEFT cannot adapt this model.*LlamaAttention"),
        ({"modules_to_save": ["head"]}, "adapter.modules_to_save: no module .* 'head'"),
    ],
)
def test_a_module_that_cannot_be_adapted(settings: dict, says: str, text_model: Path) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        adapted(text_model, **settings)
    one_line(error)


def test_a_shared_weight_is_not_adapted() -> None:
    shape = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    for settings in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}):
        model = cast(Model, SimpleNamespace(module=LlamaForCausalLM(shape), merged_adapter=None))
        with pytest.raises(ConfigError, match="shares its weights with") as error:
            adapting.attach(model, AdapterConfig(**settings), ModelConfig(path="tiny"), "-")  # type: ignore[arg-type]
        one_line(error)


def test_an_adapter_of_another_model_is_refused(text_model: Path, tmp_path: Path) -> None:
    adapted(text_model).save(tmp_path / "saved")
    other = tmp_path / "other"
    changed = load_model(ModelConfig(path=str(text_model)), "fp32")
    with torch.no_grad():
        changed.module.lm_head.weight[0, 0] += 1
    changed.save(other)
    with pytest.raises(ConfigError, match=f"trained on weights with the hash .*, but model.path {other}") as error:
        load_model(ModelConfig(path=str(other)), "fp32", weights=str(tmp_path / "saved"))
    one_line(error)

    (tmp_path / "saved" / BASE).unlink()  # as PEFT saves it: only names and shapes tell
    settings = json.loads((tmp_path / "saved" / CONFIG).read_text())
    (tmp_path / "saved" / CONFIG).write_text(json.dumps(settings | {"r": 2}))
    with pytest.raises(ConfigError, match=r"does not fit model.path .*have another shape") as error:
        load_model(ModelConfig(path=str(text_model)), "fp32", weights=str(tmp_path / "saved"))
    one_line(error)
    (tmp_path / "saved" / CONFIG).write_text(json.dumps(settings | {"peft_type": "LOHA"}))
    with pytest.raises(ConfigError, match="of type LOHA, only LORA"):
        load_model(ModelConfig(path=str(text_model)), "fp32", weights=str(tmp_path / "saved"))


def test_an_adapter_of_an_adapter_is_refused(text_model: Path, tmp_path: Path) -> None:
    adapted(text_model).save(tmp_path / "saved")
    with pytest.raises(ConfigError, match="merge it first") as error:
        adapted(tmp_path / "saved")
    one_line(error)


def test_without_peft_one_line_names_the_extra(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"section adapter, but peft does not import .*craft-ray\[lora\]") as error:
        adapted(text_model)
    one_line(error)
